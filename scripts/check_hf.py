#!/usr/bin/env python3
"""Holds a folder that titan wrote in Hugging Face's format to what transformers makes of it.

    check_hf.py DIR                                   greedy text of titan and of transformers
    check_hf.py DIR --expected tests/golden/hf_llama3/expected.safetensors
                                                      transformers' logits of DIR and those of the file
    check_hf.py --golden tests/golden                 the same for each hf_* there, converted to titan's format and back

An expected.safetensors holds `tokens` (b, s) and `logits` (b, s, v). Without a tokenizer in DIR, whose texts could be
compared, it compares logits only. Needs torch, transformers and safetensors, and `titan` in PATH or as --titan.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = ["Once upon a time", "The capital of France is", "def main():"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=Path, nargs="?")
    parser.add_argument("--golden", type=Path, metavar="FOLDER")
    parser.add_argument("--expected", type=Path)
    parser.add_argument("--tolerance", type=float, default=2e-5, help="of logits, over the largest logit")
    parser.add_argument("--tokens", type=int, default=32, help="length of the greedy texts")
    parser.add_argument("--titan", default="titan")
    args = parser.parse_args()
    if (args.dir is None) == (args.golden is None):
        parser.error("name a DIR, or --golden FOLDER")
    sys.exit(1 if (check_golden(args) if args.golden else check(args)) else 0)


def check_golden(args):
    faults = []
    for case in sorted(args.golden.glob("hf_*")):
        with tempfile.TemporaryDirectory() as folder:
            ours, args.dir = Path(folder) / "titan", Path(folder) / case.name
            for direction in (["--from-hf", case, "--to", ours], ["--to-hf", ours, "--to", args.dir]):
                subprocess.run([args.titan, "convert", *direction], check=True, capture_output=True)
            args.expected = case / "expected.safetensors"
            faults += check(args)
    return faults


def check(args):
    model, report = AutoModelForCausalLM.from_pretrained(
        args.dir, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    model.eval()
    faults = [f"{what}: {names}" for what, names in report.items() if names]
    print(f"{args.dir}: {type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters")
    faults += compare_logits(model, args) if args.expected else compare_texts(model, args)
    for fault in faults:
        print(f"  {fault}")
    return faults


@torch.no_grad()
def compare_logits(model, args):
    expected = load_file(args.expected)
    logits = model(expected["tokens"]).logits
    error = ((logits - expected["logits"]).abs().max() / expected["logits"].abs().max()).item()
    print(f"  logits: {error:.1e} of the largest logit apart")
    return [f"logits are further apart than {args.tolerance:.0e}"] if not error <= args.tolerance else []


@torch.no_grad()
def compare_texts(model, args):
    tokenizer = AutoTokenizer.from_pretrained(args.dir)
    faults = []
    for prompt in PROMPTS:
        command = [args.titan, "generate", "--checkpoint", args.dir, "--prompt", prompt, "--temperature", "0"]
        command += ["--max-new-tokens", str(args.tokens)]
        ours = subprocess.run(command, check=True, capture_output=True, text=True).stdout.rstrip()
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        ids = model.generate(ids, do_sample=False, max_new_tokens=args.tokens)
        theirs = tokenizer.decode(ids[0], skip_special_tokens=True).rstrip()
        same = ours == theirs
        print(f"  {prompt!r}: {'the same text' if same else 'different texts'}")
        if not same:
            faults.append(f"titan:        {ours!r}\n  transformers: {theirs!r}")
    return faults


if __name__ == "__main__":
    main()
