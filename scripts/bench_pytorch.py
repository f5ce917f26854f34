#!/usr/bin/env python3
"""Whole training steps of titan's models in PyTorch: forward, backward, clipping, AdamW.

    bench_pytorch.py --case A                      one JSON line per way, as `cargo bench --bench train_step -- --json`
    bench_pytorch.py --check tests/golden          holds the models below to the golden files
    bench_pytorch.py --case A --fastest RESULTS    names the best f32 and the best bf16 way among such lines
    bench_pytorch.py --table RESULTS               makes a table of such lines from both programs

    bench_pytorch.py --device cuda --case debug    the same on a GPU; `--check` takes `--device cuda` too

Needs PyTorch 2.15, 2.10 on a GPU, and safetensors for `--check`. The models are written for PyTorch to be fast on a CPU;
where that was not the obvious choice, a comment says what was slower. On a GPU they run as TorchTitan's do on one: weights
in f32 with bf16 autocast, its choice of attention kernels, all logits at once, fused AdamW, and where they are compiled,
each block and the loss by itself.
"""

import argparse
import functools
import gc
import itertools
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

ROOT = Path(__file__).resolve().parent.parent
WAYS = ["f32-eager", "f32-compile", "bf16-eager", "bf16-compile"]
# On a GPU: "bf16" computes under autocast, "mixed" with bf16 copies of all weights and a bf16 residual stream, as under
# FSDP's mixed precision; "compile" is block by block, "whole" the model as one.
GPU_WAYS = [f"{precision}-{mode}" for precision in ("bf16", "mixed", "f32") for mode in ("eager", "compile", "whole")]
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
# In the order in which TorchTitan tries them.
ATTENTION = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
# Dense bf16 peaks of NVIDIA's data sheets, in TFLOP/s; others are measured. A name comes before any that it contains.
GPU_PEAKS = {"A100": 312, "H100 NVL": 835, "H100 PCIe": 756, "H100": 989, "H200 NVL": 835, "H200": 989, "B200": 2250}
# Logits of 512 MiB. Where a batch has more, the loss takes CHUNK rows at a time: a third to a half of the time.
MOST_LOGITS, CHUNK = 1 << 27, 1024
# With smaller heads, PyTorch's bf16 attention takes 1.7 times as long as its f32 attention, forward and backward.
LEAST_BF16_HEAD_DIM = 64


class Attention(nn.Module):
    def __init__(self, args, out_std):
        super().__init__()
        self.head_dim = args["dim"] // args["n_heads"]
        width, kv_width = args["dim"], (args["n_kv_heads"] or args["n_heads"]) * self.head_dim
        self.wq, self.wk, self.wv = linear(width, width), linear(width, kv_width), linear(width, kv_width)
        self.wo = linear(width, width, out_std)

    def forward(self, x, rope, mask):
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))  # (b, s, h, hd)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if x.is_cuda:
            with sdpa_kernel(ATTENTION, set_priority=True):
                y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
            return self.wo(y.transpose(1, 2).flatten(2))
        in_bf16 = torch.is_autocast_enabled("cpu") and self.head_dim >= LEAST_BF16_HEAD_DIM
        if not in_bf16:
            q, k, v = q.float(), k.float(), v.float()
        with torch.autocast("cpu", enabled=in_bf16):
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
        return self.wo(y.transpose(1, 2).flatten(2))


def rotate(x, rope):
    """Rotates adjacent pairs by the angles of their positions, in f32."""
    cos, sin = rope
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype)


class FeedForward(nn.Module):
    def __init__(self, dim, hidden_dim, out_std):
        super().__init__()
        self.w1, self.w2, self.w3 = linear(dim, hidden_dim), linear(hidden_dim, dim, out_std), linear(dim, hidden_dim, out_std)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Experts(nn.Module):
    def __init__(self, n, dim, hidden_dim, out_std):
        super().__init__()
        self.w1 = normal(n, hidden_dim, dim)
        self.w2 = normal(n, dim, hidden_dim, std=out_std)
        self.w3 = normal(n, hidden_dim, dim, std=out_std)

    def forward(self, x, n_tokens):
        """`x` is sorted by expert; `n_tokens` of it are each one's. A loop over x.split() is as fast, but ends a graph."""
        offsets = n_tokens.cumsum(0).to(torch.int32)
        w1, w2, w3 = (w.to(x.dtype).transpose(1, 2) for w in (self.w1, self.w2, self.w3))
        hidden = F.silu(F.grouped_mm(x, w1, offs=offsets)) * F.grouped_mm(x, w3, offs=offsets)
        return F.grouped_mm(hidden, w2, offs=offsets)


class Router(nn.Module):
    def __init__(self, n, dim, out_std):
        super().__init__()
        self.gate = linear(dim, n, out_std)


class Moe(nn.Module):
    def __init__(self, args, dim, hidden_dim, out_std):
        super().__init__()
        self.args, n = args, args["num_experts"]
        self.router, self.experts = Router(n, dim, out_std), Experts(n, dim, hidden_dim, out_std)
        n_shared = args["num_shared_experts"]
        self.shared_experts = FeedForward(dim, n_shared * hidden_dim, out_std) if n_shared else None
        self.register_buffer("expert_bias", torch.zeros(n))
        self.register_buffer("tokens_per_expert", torch.zeros(n, dtype=torch.int64), persistent=False)

    def forward(self, x):
        args, top_k, shape, x = self.args, self.args["top_k"], x.shape, x.flatten(0, 1)
        logits = self.router.gate(x).float()
        scores = logits.sigmoid() if args["score_func"] == "sigmoid" else logits.softmax(-1)
        chosen = (scores.detach() + self.expert_bias).topk(top_k).indices
        weights = scores.gather(1, chosen)
        if args["route_norm"]:
            weights = weights / weights.sum(-1, keepdim=True)
        weights, chosen = (weights * args["route_scale"]).view(-1, 1), chosen.flatten()

        order = chosen.argsort(stable=True)
        n_tokens = (chosen[:, None] == torch.arange(args["num_experts"], device=x.device)).sum(0)
        self.tokens_per_expert += n_tokens
        slots = x.repeat_interleave(top_k, 0)
        if args["score_before_experts"]:
            slots = slots * weights
        y = self.experts(slots.to(compute_dtype(x)).index_select(0, order), n_tokens).index_select(0, order.argsort())
        if not args["score_before_experts"]:
            y = y * weights
        y = y.unflatten(0, (-1, top_k)).sum(1) if top_k > 1 else y
        y = y.to(x.dtype) if x.is_cuda else y
        if self.shared_experts is not None:
            y = y + self.shared_experts(x)
        return y.view(shape)

    @torch.no_grad()
    def rebalance(self):
        n_tokens, coeff = self.tokens_per_expert, self.args["load_balance_coeff"]
        if coeff:
            moves = coeff * torch.sign(n_tokens.float().mean() - n_tokens)
            self.expert_bias += moves - moves.mean()
        n_tokens.zero_()


class Block(nn.Module):
    def __init__(self, args, layer):
        super().__init__()
        dim, moe = args["dim"], args.get("moe_args")
        out_std = 0.02 / math.sqrt(2 * (layer + 1 if args["depth_init"] else args["n_layers"]))
        hidden_dim = int((args["ffn_dim_multiplier"] or 1) * (8 * dim // 3))
        self.is_moe = moe is not None and (layer + 1) % args["interleave_moe_layer_step"] == 0
        if self.is_moe and args["auto_scale_hidden_dim"]:
            hidden_dim //= moe["top_k"] + moe["num_shared_experts"]
        hidden_dim = math.ceil(hidden_dim / args["multiple_of"]) * args["multiple_of"]

        self.attention_norm, self.ffn_norm = (nn.RMSNorm(dim, args["norm_eps"]) for _ in range(2))
        self.attention = Attention(args, out_std)
        if self.is_moe:
            self.moe = Moe(moe, dim, hidden_dim, out_std)
        else:
            self.feed_forward = FeedForward(dim, hidden_dim, out_std)
        every_n = args.get("every_n_layers_nope")
        self.uses_rope = every_n is None or layer % every_n != 0

    def forward(self, x, rope, mask, block_mask):
        rope, mask = (rope, block_mask) if self.uses_rope else (None, mask)
        x = x + self.attention(self.attention_norm(x), rope, mask)
        return x + (self.moe if self.is_moe else self.feed_forward)(self.ffn_norm(x))


class Decoder(nn.Module):
    """The model that `args` describe, with the names of titan's parameters."""

    def __init__(self, args, eos_id=None, most_logits=MOST_LOGITS):
        super().__init__()
        self.args, self.eos_id, self.most_logits = args, eos_id, most_logits
        self.recompute, self.loss = False, mean_loss
        dim, vocab_size = args["dim"], args["vocab_size"]
        self.tok_embeddings = nn.Embedding(vocab_size, dim)
        self.layers = nn.ModuleList(Block(args, layer) for layer in range(args["n_layers"]))
        self.norm = nn.RMSNorm(dim, args["norm_eps"])
        self.output = linear(dim, vocab_size, dim**-0.5, 3 * dim**-0.5)
        angles = torch.arange(args["max_seq_len"])[:, None] * frequencies(args)
        self.register_buffer("cos", angles.cos()[:, None], persistent=False)  # (s, 1, hd / 2)
        self.register_buffer("sin", angles.sin()[:, None], persistent=False)

    def forward(self, tokens, labels):
        """The mean loss of `tokens` and `labels`, (b, s)."""
        x, labels = self.tok_embeddings(tokens), labels.flatten()
        rope, (mask, block_mask) = (self.cos, self.sin), self.masks(tokens)
        for block in self.layers:
            if self.recompute:
                x = checkpoint(block, x, rope, mask, block_mask, use_reentrant=False)
            else:
                x = block(x, rope, mask, block_mask)
        x = self.norm(x).flatten(0, 1)
        if x.is_cuda or labels.numel() * self.args["vocab_size"] <= self.most_logits:
            return self.loss(self.output(x), labels)
        dtype = compute_dtype(x)
        # The options that it chooses by itself are ten times as slow for bf16 on a CPU.
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK, acc_policy="compact")
        return F.linear_cross_entropy(x.to(dtype), self.output.weight.to(dtype), labels, options=options)

    def masks(self, tokens):
        """What layers without and with rotary positions may see; None: every earlier position."""
        if self.args["attn_type"] == "sdpa":
            return None, None
        s = tokens.shape[1]
        mask = torch.ones(s, s, dtype=torch.bool, device=tokens.device).tril()[None, None]
        if self.args["attn_mask_type"] == "block_causal":
            ends = tokens == self.eos_id
            document = ends.cumsum(1) - ends.long()
            mask = mask & (document[:, None, :, None] == document[:, None, None, :])
        block_size = self.args.get("fixed_attn_block_size")
        block = torch.arange(s, device=tokens.device) // (block_size or s)
        return mask, mask & (block[:, None] == block)


def mean_loss(logits, labels):
    return F.cross_entropy(logits.float(), labels)


def compute_dtype(x):
    """The dtype of products with `x`."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def frequencies(args):
    head_dim, scaling = args["dim"] // args["n_heads"], args["rope_scaling_args"]
    frequencies = 1 / args["rope_theta"] ** (torch.arange(0, head_dim, 2) / head_dim)
    if not scaling:
        return frequencies
    wavelengths, original = 2 * math.pi / frequencies, scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = (original / wavelengths - low) / max(high - low, 1e-30)
    return torch.lerp(frequencies / scaling["scaling_factor"], frequencies, smooth.clamp(0, 1))


def normal(*shape, std=0.02, limit=2.0):
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=std, a=-limit, b=limit))


def linear(in_dim, out_dim, std=0.02, limit=2.0):
    layer = nn.Linear(in_dim, out_dim, bias=False)
    layer.weight = normal(out_dim, in_dim, std=std, limit=limit)
    return layer


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def train_step(model, loss_of, optimizer, micro_batches):
    """One optimizer step on `micro_batches` of tokens and labels; returns the loss and the norm of the gradients."""
    optimizer.zero_grad()
    total = 0.0
    for tokens, labels in micro_batches:
        loss = loss_of(tokens, labels) / len(micro_batches)
        loss.backward()
        total += loss.item()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for block in model.layers:
        if block.is_moe:
            block.moe.rebalance()
    optimizer.step()
    return total, norm.item()


def load_case(name):
    """The entry of benches/cases.json, with all of its model's arguments."""
    cases = {name: case for of_device in read_cases().values() for name, case in of_device.items()}
    if name not in cases:
        sys.exit(f"error: there is no case {name}\n  = allowed: {', '.join(cases)}")
    flavors = json.loads((ROOT / "tests/golden/flops.json").read_text())
    case = cases[name]
    args = flavors[case["model"]][case["flavor"]]["config"] | case["args"] | {"max_seq_len": case["seq_len"]}
    if "moe_args" in case["args"]:
        args["moe_args"] = flavors[case["model"]][case["flavor"]]["config"]["moe_args"] | case["args"]["moe_args"]
    return case | {"args": args}


def read_cases():
    """The cases by the kind of device that they are meant for."""
    return json.loads((ROOT / "benches/cases.json").read_text())


def bench(name, way, steps):
    """Runs `steps` steps and one before them, in which torch.compile compiles and AdamW takes its memory."""
    torch.manual_seed(0)
    case = load_case(name)
    precision, mode = way.split("-")
    dtype = DTYPES[precision]
    peak_flops = matrix_peak(dtype)
    model = Decoder(case["args"])
    optimizer = adamw(model)
    forward = torch.compile(model, dynamic=False) if mode == "compile" else model

    def loss_of(tokens, labels):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return forward(tokens, labels)

    losses, elapsed_s = [], []
    for _ in range(1 + steps):
        ids = torch.randint(case["args"]["vocab_size"], (case["batch"], case["seq_len"] + 1))
        start = time.perf_counter()
        losses.append(train_step(model, loss_of, optimizer, [(ids[:, :-1], ids[:, 1:])])[0])
        elapsed_s.append(time.perf_counter() - start)
    return {
        "program": f"PyTorch {torch.__version__}",
        "case": name,
        "way": way,
        "threads": torch.get_num_threads(),
        "n_params": sum(p.numel() for p in model.parameters()),
        "step_s": (step_s := statistics.median(elapsed_s[1:])),
        "tps": case["batch"] * case["seq_len"] / step_s,
        "peak_flops": peak_flops,
        "peak_mem_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


class Mixed:
    """A fused AdamW over f32 masters of a model whose parameters it turns into bf16 copies."""

    def __init__(self, model):
        self.copies, self.masters = list(model.parameters()), []
        for copy in self.copies:
            master = nn.Parameter(copy.detach().clone())
            master.grad = torch.zeros_like(master)
            copy.data = copy.data.bfloat16()
            self.masters.append(master)
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def zero_grad(self):
        for copy in self.copies:
            copy.grad = None

    def gather(self):
        """Gradients to the masters; returns these."""
        torch._foreach_copy_([master.grad for master in self.masters], [copy.grad for copy in self.copies])
        return self.masters

    def step(self):
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self.copies, self.masters)


def bench_gpu(name, way, steps, warm_up, recompute):
    """As `bench`, on a GPU. Nothing is read back in a step; the time is the wall clock around all of them."""
    torch.manual_seed(0)
    case = load_case(name)
    precision, mode = way.split("-")
    batch, seq_len, vocab_size = case["batch"], case["seq_len"], case["args"]["vocab_size"]
    torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    with torch.device("cuda"):
        model = Decoder(case["args"])
    if precision == "mixed":
        optimizer = Mixed(model)
        parameters = optimizer.gather
    else:
        optimizer, parameters = adamw(model), model.parameters
    model.recompute = (recompute or case["recompute"]) == "full"
    forward = model
    if mode == "compile":
        for block in model.layers:
            block.compile(fullgraph=True, dynamic=False)
        model.loss = torch.compile(mean_loss, fullgraph=True, dynamic=False)
    elif mode == "whole":
        forward = torch.compile(model, dynamic=False)

    def train_step(ids):
        optimizer.zero_grad()
        ids = ids.to("cuda", non_blocking=True)
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
            loss = forward(ids[:, :-1], ids[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(parameters(), 1.0, foreach=True)
        optimizer.step()
        for block in model.layers:
            if block.is_moe:
                block.moe.rebalance()
        return loss.detach()

    batches = [torch.randint(vocab_size, (batch, seq_len + 1), pin_memory=True) for _ in range(warm_up + steps)]
    losses = [train_step(ids) for ids in batches[:warm_up]]
    torch.cuda.synchronize()
    warm_up_s, start = time.perf_counter() - begin, time.perf_counter()
    losses += [train_step(ids) for ids in batches[warm_up:]]
    torch.cuda.synchronize()
    step_s = (time.perf_counter() - start) / steps
    return {
        "program": f"PyTorch {torch.__version__}",
        "case": name,
        "way": way,
        "device": torch.cuda.get_device_name(),
        "n_params": sum(p.numel() for p in model.parameters()),
        "step_s": step_s,
        "tps": batch * seq_len / step_s,
        "flops_per_token": flops_per_token(model, seq_len),
        "peak_flops": gpu_peak(),
        "peak_mem_bytes": torch.cuda.max_memory_allocated(),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        "warm_up_s": warm_up_s,
        "first_loss": losses[0].item(),
        "last_loss": losses[-1].item(),
    }


def bench_on_gpu(name, ways, steps, warm_up, recompute):
    """A line of JSON for each way. One that fails says so in its line."""
    torch.backends.cuda.matmul.allow_tf32 = False
    for way in ways:
        try:
            line = bench_gpu(name, way, steps, warm_up, recompute)
        except Exception as error:
            what = "out of memory" if isinstance(error, torch.OutOfMemoryError) else str(error).strip().split("\n")[0]
            line = {"program": f"PyTorch {torch.__version__}", "case": name, "way": way, "error": what[:300]}
        print(json.dumps(line), flush=True)
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()


def flops_per_token(model, seq_len):
    """As TorchTitan counts them, and titan: the embedding and experts that a token does not see are left out."""
    n_active, args = 0, model.args
    for name, parameter in model.named_parameters():
        share = args["moe_args"]["top_k"] / args["moe_args"]["num_experts"] if ".moe.experts." in name else 1
        n_active += 0 if name.startswith("tok_embeddings") else int(parameter.numel() * share)
    return 6 * n_active + 12 * args["n_layers"] * args["dim"] * seq_len


@functools.cache
def gpu_peak():
    name = torch.cuda.get_device_name()
    known = (1e12 * tflops for gpu, tflops in GPU_PEAKS.items() if gpu in name)
    return next(known, None) or matrix_peak(torch.bfloat16, "cuda", 8192)


def matrix_peak(dtype, device="cpu", size=2048):
    """FLOP/s of the best of several square products."""
    a, best_s = torch.ones(size, size, dtype=dtype, device=device), math.inf
    for _ in range(10):
        start = time.perf_counter()
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        best_s = min(best_s, time.perf_counter() - start)
    return 2 * size**3 / best_s


def check(folder, device):
    """Losses, gradients and weights of three steps, against the golden files and within their tolerances."""
    from safetensors.torch import load_file

    paths = sorted(Path(folder).glob("llama*.json"))
    if not paths:
        sys.exit(f"error: {folder} holds no llama*.json; the golden files are in tests/golden")
    torch.backends.cuda.matmul.allow_tf32 = False
    # On a GPU all logits are whole.
    for path, most_logits in itertools.product(paths, (MOST_LOGITS, 0) if device == "cpu" else (MOST_LOGITS,)):
        case, tensors = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"), device)
        tolerance, model = case["tolerance"], Decoder(case["config"], case["eos_id"], most_logits).to(device)
        state = model.state_dict(keep_vars=True)
        with torch.no_grad():
            for name, tensor in state.items():
                if f"init.{name}" in tensors:
                    tensor.copy_(tensors[f"init.{name}"])
        optimizer = adamw(model)

        def expect(error, what, limit):
            if not error < limit:
                sys.exit(f"error: {path.stem}: {what} is off by {error:.1e}, more than {limit:.0e}")

        for step in range(3):
            optimizer.param_groups[0]["lr"] = case["lr"][step]
            batches = (tensors[f"{name}.{step + 1}"].split(case["batch"]) for name in ("tokens", "labels"))
            loss, norm = train_step(model, model, optimizer, list(zip(*batches)))
            expect(abs(loss / case["loss"][step] - 1), f"loss of step {step + 1}", tolerance["loss_rel"])
            expect(abs(norm / case["grad_norm"][step] - 1), f"norm of step {step + 1}", tolerance["grad_norm_rel"])
            clipped = min(1, 1 / (norm + 1e-6))
            for name, tensor in state.items():
                after = tensors.get(f"step{step + 1}.{name}")
                if after is not None:
                    limit = tolerance["expert_bias_abs" if "expert_bias" in name else "params_abs"]
                    expect((tensor - after).abs().max().item(), f"{name} after step {step + 1}", limit)
                if step == 0 and tensor.requires_grad:
                    grad = tensors[f"grad.{name}"]
                    difference = (tensor.grad / clipped - grad).abs().max() / grad.abs().max()
                    expect(difference.item(), f"gradient of {name}", tolerance["grad_rel"])
        loss = "whole" if most_logits else "chunked"
        print(f"{path.stem}, {loss} loss: losses, gradients and weights of three steps agree")


def read_results(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def medians(results, program, case):
    """Lines of one program and case by way, with the medians over their rounds."""
    ways = {}
    for line in results:
        if line["case"] == case and line["program"].startswith(program):
            ways.setdefault(line["way"], []).append(line)
    middle = lambda lines: {key: statistics.median(it[key] for it in lines) for key in ("tps", "peak_mem_bytes")}
    return {way: lines[0] | middle(lines) for way, lines in ways.items()}


def fastest(results, case, precision=""):
    """PyTorch's best way; of both precisions if none is named."""
    ways = [line for way, line in medians(results, "PyTorch", case).items() if way.startswith(precision)]
    return max(ways, key=lambda line: line["tps"], default=None)


def table(results):
    """One row per case and precision: titan's bf16 against the best of all of PyTorch's ways, its f32 against the best f32."""
    rows = [["case", "precision", "titan tok/s", "PyTorch tok/s", "its best way", "ratio", "titan GiB", "PyTorch GiB", "titan of floor"]]
    for case in sorted({line["case"] for line in results}):
        for precision, titan in medians(results, "titan", case).items():
            torchs = fastest(results, case, "f32" if precision == "f32" else "")
            if torchs is None:
                continue
            if torchs["n_params"] != titan["n_params"]:
                sys.exit(f"error: case {case} has {titan['n_params']} parameters in titan, {torchs['n_params']} in PyTorch")
            peaks = [it["peak_flops"] for it in results if it["way"].startswith(precision)]
            floor_tps = max(peaks) / titan["flops_per_token"]
            gib = [f"{it['peak_mem_bytes'] / 2**30:.2f}" for it in (titan, torchs)]
            rows.append([case, precision, f"{titan['tps']:.0f}", f"{torchs['tps']:.0f}", torchs["way"]])
            rows[-1] += [f"{titan['tps'] / torchs['tps']:.2f}", *gib, f"{100 * titan['tps'] / floor_tps:.0f}%"]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    programs = " and ".join(sorted({it["program"] for it in results}, reverse=True))
    return f"{programs}, {results[0]['threads']} threads\n\n" + "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", help="a case of benches/cases.json")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--way", default="all", help=f"one of {', '.join(WAYS)}, or all; on a GPU some of {', '.join(GPU_WAYS)}, "
                        "with commas between them, or all: bf16-eager,bf16-compile")
    parser.add_argument("--steps", type=int, help="timed steps: 3, on a GPU 20")
    parser.add_argument("--warm-up", type=int, default=5, help="steps before them, on a GPU")
    parser.add_argument("--recompute", choices=["none", "full"], help="on a GPU: what backward computes again, if not what the case says")
    parser.add_argument("--threads", type=int, help="as many as there are cores, if not given")
    parser.add_argument("--check", metavar="FOLDER")
    parser.add_argument("--fastest", metavar="RESULTS")
    parser.add_argument("--table", metavar="RESULTS")
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    ways = options.way.split(",") if options.way != "all" else ["bf16-eager", "bf16-compile"] if on_gpu else ["all"]
    unknown = set(ways) - set(GPU_WAYS if on_gpu else [*WAYS, "all"])
    if unknown or (len(ways) > 1 and not on_gpu):
        parser.error(f"--way {options.way} is none of {', '.join(GPU_WAYS if on_gpu else [*WAYS, 'all'])}")
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.check:
        check(options.check, options.device)
    elif options.table:
        print(table(read_results(options.table)))
    elif options.fastest:
        results = read_results(options.fastest)
        best = (fastest(results, options.case, precision) for precision in DTYPES)
        print(*(line["way"] for line in best if line))
    elif options.case is None:
        parser.error("--case, --check or --table is needed")
    elif on_gpu:
        bench_on_gpu(options.case, ways, options.steps or 20, options.warm_up, options.recompute)
    elif options.way == "all":
        # Each in a process of its own: peak memory is that of a process.
        for way in WAYS:
            subprocess.run([sys.executable, *sys.argv, "--way", way], check=True)
    else:
        print(json.dumps(bench(options.case, options.way, options.steps or 3)), flush=True)


if __name__ == "__main__":
    main()
