//! Arguments that no decoder can be built with.

use super::args::{AttentionKind, DecoderArgs, FeedForwardKind, MoeArgs, NormType, QkNormOver, RopeLayout};
use super::layer::LayerArgs;

/// No model is wider; the parameters of a layer this wide still fit an integer.
const WIDTH: usize = 1 << 24;

/// Arguments that contradict each other, or that nothing can be built with.
#[derive(Debug)]
pub struct Clash {
    /// Paths within [`DecoderArgs`].
    pub keys: &'static [&'static str],
    pub what: String,
    pub remedy: String,
}

fn clash(keys: &'static [&'static str], what: impl Into<String>, remedy: impl Into<String>) -> Clash {
    Clash { keys, what: what.into(), remedy: remedy.into() }
}

impl DecoderArgs {
    /// Every clash between arguments; none in a model that can be built.
    pub fn clashes(&self) -> Vec<Clash> {
        // Sizes first: the other rules divide by them and multiply them.
        if let Some(clash) = self.impossible_size() {
            return vec![clash];
        }
        let mut clashes = Vec::new();
        self.patterns(&mut clashes);
        let latent = || self.attentions().map(|layer| layer.latent_dim.is_some());
        if latent().any(|is_latent| !is_latent) {
            self.grouped_attention(&mut clashes);
        }
        if latent().any(|is_latent| is_latent) {
            self.latent_attention(&mut clashes, latent().all(|is_latent| is_latent));
        }
        self.norms_and_positions(&mut clashes);
        self.feed_forward(&mut clashes);
        if let Some(moe) = &self.moe_args {
            experts(moe, &mut clashes);
        }
        clashes
    }

    /// A size that is 0, or beyond any model: products of the others are exact, and counting layers and experts takes no
    /// memory to speak of.
    fn impossible_size(&self) -> Option<Clash> {
        const POSITIONS: usize = 1 << 32;
        const LAYERS: usize = 1 << 12;
        const EXPERTS: usize = 1 << 14;
        let or_one = |size: Option<usize>| size.unwrap_or(1);
        let experts = |size: fn(&MoeArgs) -> usize| self.moe_args.as_ref().map_or(1, size);
        let sizes: [(&[&str], usize, usize); 25] = [
            (&["dim"], self.dim, WIDTH),
            (&["n_layers"], self.n_layers, LAYERS),
            (&["n_heads"], self.n_heads, WIDTH),
            (&["n_kv_heads"], or_one(self.n_kv_heads), WIDTH),
            (&["head_dim"], or_one(self.head_dim), WIDTH),
            (&["vocab_size"], self.vocab_size, WIDTH),
            (&["hidden_dim"], or_one(self.hidden_dim), WIDTH),
            (&["inter_dim"], or_one(self.inter_dim), WIDTH),
            (&["moe_inter_dim"], or_one(self.moe_inter_dim), WIDTH),
            (&["multiple_of"], self.multiple_of, WIDTH),
            (&["kv_lora_rank"], or_one(self.kv_lora_rank), WIDTH),
            (&["q_lora_rank"], self.q_lora_rank.max(1), WIDTH),
            (&["qk_nope_head_dim"], self.qk_nope_head_dim, WIDTH),
            (&["qk_rope_head_dim"], self.qk_rope_head_dim, WIDTH),
            (&["v_head_dim"], self.v_head_dim, WIDTH),
            (&["max_seq_len"], self.max_seq_len, POSITIONS),
            (&["original_seq_len"], self.original_seq_len, POSITIONS),
            (&["fixed_attn_block_size"], or_one(self.fixed_attn_block_size), POSITIONS),
            (&["sliding_window"], or_one(self.sliding_window), POSITIONS),
            (&["every_n_layers_nope"], or_one(self.every_n_layers_nope), POSITIONS),
            (&["interleave_moe_layer_step"], self.interleave_moe_layer_step, POSITIONS),
            (&["moe_args.num_experts"], experts(|moe| moe.num_experts), EXPERTS),
            (&["moe_args.num_shared_experts"], experts(|moe| moe.num_shared_experts.max(1)), EXPERTS),
            (&["moe_args.top_k"], experts(|moe| moe.top_k), EXPERTS),
            (&["floor_scale"], self.floor_scale, POSITIONS),
        ];
        let (keys, size, most) = sizes.into_iter().find(|(_, size, most)| !(1..=*most).contains(size))?;
        let what = if size == 0 { "cannot be 0".to_owned() } else { format!("{size} is beyond any model") };
        Some(clash(keys, format!("`{}` {what}", keys[0]), format!("at least 1, and at most {most}")))
    }

    /// Layers enough for each kind of attention that the model has, with rotary positions and without, to be among them.
    fn attentions(&self) -> impl Iterator<Item = LayerArgs> {
        let period = self.latent_pattern.len().max(1) * self.rope_pattern.len().max(1);
        // A layer that `every_n_layers_nope` leaves out need not be left out a period later.
        (0..self.n_layers.min(2 * period)).map(|index| self.layer(index))
    }

    /// Lists whose words need an argument that is not there, and arguments that no word needs.
    fn patterns(&self, clashes: &mut Vec<Clash>) {
        let mut push = |keys, what: &str, remedy: &str| clashes.push(clash(keys, what, remedy));
        let has = |kind| self.attention_pattern.contains(&kind);
        let (sliding, chunked) = (has(AttentionKind::Sliding), has(AttentionKind::Chunked));
        if sliding != self.sliding_window.is_some() {
            const KEYS: &[&str] = &["attention_pattern", "sliding_window"];
            match sliding {
                true => push(KEYS, "sliding layers have no window", "set `sliding_window`"),
                false => push(KEYS, "no layer slides", "add \"sliding\" to `attention_pattern`"),
            }
        }
        if chunked && self.fixed_attn_block_size.is_none() {
            let keys = &["attention_pattern", "fixed_attn_block_size"];
            push(keys, "chunked layers have no block size", "set `fixed_attn_block_size`");
        }
        if self.local_rope_theta.is_some() && !sliding && !chunked {
            let remedy = "add \"sliding\" or \"chunked\" to `attention_pattern`";
            push(&["local_rope_theta", "attention_pattern"], "no layer is local", remedy);
        }
        if self.every_n_layers_nope.is_some() && !self.rope_pattern.is_empty() {
            let keys = &["rope_pattern", "every_n_layers_nope"];
            push(keys, "two rules say which layers rotate", "set one of them");
        }
        if self.attn_temperature_tuning && self.attentions().all(|layer| layer.rope.is_some()) {
            let keys = &["attn_temperature_tuning", "rope_pattern", "every_n_layers_nope"];
            push(keys, "every layer rotates, and none is tuned", "add false to `rope_pattern`");
        }
        if self.qk_unit_norm && !self.attentions().any(|layer| layer.rope.is_some() && layer.latent_dim.is_none()) {
            let keys = &["qk_unit_norm", "rope_pattern", "kv_lora_rank"];
            push(keys, "no layer of grouped-query attention rotates", "set `qk_unit_norm` to false");
        }
        if self.latent_pattern.contains(&true) && self.kv_lora_rank.is_none() {
            push(&["latent_pattern", "kv_lora_rank"], "latents have no width", "set `kv_lora_rank`");
        }
        if self.feed_forward_pattern.is_empty() {
            return;
        }
        if self.interleave_moe_layer_step != 1 || self.n_dense_layers != 0 {
            push(
                &["feed_forward_pattern", "interleave_moe_layer_step", "n_dense_layers"],
                "two rules say which layers are mixtures of experts",
                "leave `interleave_moe_layer_step` at 1 and `n_dense_layers` at 0",
            );
        }
        let has_moe = self.feed_forward_pattern.contains(&FeedForwardKind::Moe);
        if has_moe && (self.moe_args.is_none() || !self.moe_enabled) {
            let keys = &["feed_forward_pattern", "moe_args", "moe_enabled"];
            push(keys, "there are no experts for layers of \"moe\"", "set `moe_args`, and `moe_enabled` to true");
        }
    }

    fn grouped_attention(&self, clashes: &mut Vec<Clash>) {
        let Self { dim, n_heads, .. } = *self;
        let n_kv_heads = self.n_kv_heads();
        let rotary: &[_] = if self.head_dim.is_some() { &["head_dim"] } else { &["dim", "n_heads"] };
        if self.head_dim.is_none() && !dim.is_multiple_of(n_heads) {
            let nearest = dim.div_ceil(n_heads) * n_heads;
            clashes.push(clash(
                &["dim", "n_heads"],
                format!("`dim` {dim} does not divide into {n_heads} heads"),
                format!("`dim` must be a multiple of `n_heads`, or `head_dim` given; nearest: {nearest}"),
            ));
        } else if !self.head_dim().is_multiple_of(2) {
            clashes.push(odd_heads(rotary, self.head_dim()));
        }
        if !n_heads.is_multiple_of(n_kv_heads) {
            // No model has more heads; a slip of twelve digits should not take minutes.
            let allowed = (1..=n_heads.min(1000)).filter(|n| n_heads.is_multiple_of(*n)).map(|n| n.to_string());
            clashes.push(clash(
                &["n_kv_heads", "n_heads"],
                format!("{n_heads} query heads cannot share {n_kv_heads} key/value heads equally"),
                format!("`n_kv_heads` must divide `n_heads`; allowed: {}", allowed.collect::<Vec<_>>().join(", ")),
            ));
        }
        if self.q_lora_rank > 0 && self.kv_lora_rank.is_none() {
            clashes.push(clash(
                &["q_lora_rank", "kv_lora_rank"],
                "only latent attention makes queries from a latent",
                "set `kv_lora_rank`, or `q_lora_rank` to 0",
            ));
        }
    }

    /// `all`: no layer has grouped-query attention, so that its arguments mean nothing.
    fn latent_attention(&self, clashes: &mut Vec<Clash>, all: bool) {
        const KEYS: &[&str] = &["qk_rope_head_dim", "qk_nope_head_dim"];
        if !self.qk_rope_head_dim.is_multiple_of(2) {
            clashes.push(odd_heads(KEYS, self.qk_rope_head_dim));
        } else if !self.qk_nope_head_dim.is_multiple_of(2) && self.rope_layout == RopeLayout::Pairs {
            clashes.push(clash(
                KEYS,
                format!("{} numbers before those that rotate would part a pair", self.qk_nope_head_dim),
                "`qk_nope_head_dim` must be even, or `rope_layout` \"halves\"",
            ));
        }
        let mut means_nothing = |keys, what: &str, remedy: &str| clashes.push(clash(keys, what, remedy));
        if all && self.n_kv_heads.is_some_and(|n| n != self.n_heads) {
            means_nothing(
                &["n_kv_heads", "kv_lora_rank"],
                "latent attention has a key and a value for every query head",
                "leave out `n_kv_heads`, or `kv_lora_rank` for grouped-query attention",
            );
        }
        if all && self.head_dim.is_some() {
            means_nothing(
                &["head_dim", "kv_lora_rank"],
                "the heads of latent attention have other widths",
                "set `qk_nope_head_dim`, `qk_rope_head_dim` and `v_head_dim` instead of `head_dim`",
            );
        }
        if all && self.qk_norm {
            means_nothing(
                &["qk_norm", "kv_lora_rank"],
                "latent attention norms its latents instead of queries and keys",
                "set `qk_norm` to false",
            );
        }
        if self.attention_bias || self.attention_out_bias {
            means_nothing(
                &["attention_bias", "attention_out_bias", "kv_lora_rank"],
                "latent attention has no biases",
                "set `attention_bias` and `attention_out_bias` to false",
            );
        }
    }

    fn norms_and_positions(&self, clashes: &mut Vec<Clash>) {
        let mut push = |keys, what: &str, remedy: &str| clashes.push(clash(keys, what, remedy));
        if self.zero_centered_norms && self.norm_type == NormType::LayerNorm {
            let keys = &["zero_centered_norms", "norm_type"];
            push(keys, "only RMSNorm takes weights around 0", "set `norm_type` to \"rms_norm\"");
        }
        if self.qk_norm_over == QkNormOver::Projection && !self.qk_norm {
            push(&["qk_norm_over", "qk_norm"], "queries and keys are not normed", "set `qk_norm` to true");
        }
        if self.rope_factor.is_some() && self.rope_scaling_args.is_some() {
            push(
                &["rope_factor", "rope_scaling_args"],
                "wavelengths cannot be stretched in two ways",
                "set one of `rope_factor` and `rope_scaling_args` to \"none\"",
            );
        }
    }

    fn feed_forward(&self, clashes: &mut Vec<Clash>) {
        match self.ffn_hidden_dim() {
            0 => {
                let what = "the feed-forward would have no width";
                clashes.push(clash(&["ffn_dim_multiplier"], what, "raise `ffn_dim_multiplier`"));
            }
            width if width > WIDTH => {
                let what = format!("a feed-forward of width {width} is beyond any model");
                let keys = &["ffn_dim_multiplier", "dim", "multiple_of"];
                clashes.push(clash(keys, what, format!("at most {WIDTH}: lower `dim` or `ffn_dim_multiplier`")));
            }
            _ => {}
        }
        if self.moe_args.is_some() && self.moe_hidden_dim() == 0 {
            let keys = &["moe_inter_dim", "auto_scale_hidden_dim", "moe_args.top_k", "moe_args.num_shared_experts"];
            clashes.push(clash(keys, "the experts would have no width", "set `moe_inter_dim`"));
        }
        if let (Some(hidden_dim), Some(inter_dim)) = (self.hidden_dim, self.inter_dim)
            && hidden_dim != inter_dim
        {
            clashes.push(clash(
                &["hidden_dim", "inter_dim"],
                format!("a dense feed-forward cannot be {hidden_dim} and {inter_dim} wide"),
                "they are two names of one width: set one",
            ));
        }
    }
}

fn odd_heads(keys: &'static [&'static str], width: usize) -> Clash {
    clash(keys, format!("heads of {width} numbers cannot rotate in pairs"), "the width of a head must be even")
}

fn experts(moe: &MoeArgs, clashes: &mut Vec<Clash>) {
    let n = moe.num_experts;
    if !(1..=n).contains(&moe.top_k) {
        clashes.push(clash(
            &["moe_args.top_k", "moe_args.num_experts"],
            format!("a token cannot go to {} of {n} experts", moe.top_k),
            "`top_k` must be at least 1 and at most `num_experts`",
        ));
    }
    const GROUPS: &[&str] = &["moe_args.num_expert_groups", "moe_args.num_limited_groups"];
    match (moe.num_expert_groups, moe.num_limited_groups) {
        (None, None) => {}
        (Some(groups), Some(limit)) => {
            if !(1..=n).contains(&groups) || !n.is_multiple_of(groups) {
                clashes.push(clash(
                    &["moe_args.num_expert_groups", "moe_args.num_experts"],
                    format!("{n} experts do not fall into {groups} equal groups"),
                    "`num_expert_groups` must divide `num_experts`",
                ));
            } else if !(1..=groups).contains(&limit) {
                let what = format!("a token cannot be limited to {limit} of {groups} groups");
                clashes.push(clash(GROUPS, what, "`num_limited_groups` must be at most `num_expert_groups`"));
            } else if n / groups * limit < moe.top_k {
                clashes.push(clash(
                    &["moe_args.top_k", "moe_args.num_limited_groups", "moe_args.num_expert_groups"],
                    format!("{limit} groups of {} experts hold less than `top_k` = {}", n / groups, moe.top_k),
                    "raise `num_limited_groups`, or lower `top_k`",
                ));
            }
        }
        _ => clashes.push(clash(GROUPS, "one of two numbers that belong together is missing", "set both, or neither")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::{FAMILIES, family, flavor};

    /// A short way to arguments: from those of the decoder family, by what a job file would say.
    fn with(toml: &str) -> DecoderArgs {
        let mut args = toml::Table::try_from(family("decoder").unwrap()).unwrap();
        args.extend(toml.parse::<toml::Table>().unwrap());
        args.try_into().unwrap()
    }

    #[test]
    fn no_flavor_clashes_with_itself() {
        for (family, flavors) in FAMILIES {
            for name in *flavors {
                assert!(flavor(family, name).unwrap().clashes().is_empty(), "{family}/{name}");
            }
        }
    }

    #[test]
    fn every_clash_names_its_keys() {
        let (llama, deepseek) = (family("llama3").unwrap(), family("deepseek_v3").unwrap());
        let moe = |change: fn(&mut MoeArgs)| {
            let mut args = deepseek.clone();
            args.moe_args.iter_mut().for_each(change);
            args
        };
        let cases = [
            (DecoderArgs { n_heads: 3, ..llama.clone() }, "dim n_heads"),
            (DecoderArgs { n_kv_heads: Some(5), ..llama.clone() }, "n_kv_heads n_heads"),
            (DecoderArgs { head_dim: Some(7), ..llama.clone() }, "head_dim"),
            (DecoderArgs { q_lora_rank: 8, ..llama.clone() }, "q_lora_rank kv_lora_rank"),
            (DecoderArgs { rope_factor: Some(4.0), ..llama.clone() }, "rope_factor rope_scaling_args"),
            (DecoderArgs { hidden_dim: Some(8), inter_dim: Some(9), ..llama.clone() }, "hidden_dim inter_dim"),
            (DecoderArgs { ffn_dim_multiplier: Some(1e-9), ..llama.clone() }, "ffn_dim_multiplier"),
            (DecoderArgs { head_dim: Some(0), ..llama.clone() }, "head_dim"),
            (DecoderArgs { dim: 1_000_000_000_000, ..llama.clone() }, "dim"),
            (DecoderArgs { n_layers: 1_000_000_000, ..llama }, "n_layers"),
            (moe(|moe| moe.num_shared_experts = usize::MAX), "moe_args.num_shared_experts"),
            (DecoderArgs { n_kv_heads: Some(8), ..deepseek.clone() }, "n_kv_heads kv_lora_rank"),
            (DecoderArgs { head_dim: Some(64), ..deepseek.clone() }, "head_dim kv_lora_rank"),
            (DecoderArgs { qk_norm: true, ..deepseek.clone() }, "qk_norm kv_lora_rank"),
            (DecoderArgs { qk_rope_head_dim: 9, ..deepseek.clone() }, "qk_rope_head_dim qk_nope_head_dim"),
            (DecoderArgs { qk_nope_head_dim: 9, ..deepseek.clone() }, "qk_rope_head_dim qk_nope_head_dim"),
            (moe(|moe| moe.top_k = 9), "moe_args.top_k moe_args.num_experts"),
            (moe(|moe| moe.num_expert_groups = Some(2)), "moe_args.num_expert_groups moe_args.num_limited_groups"),
            (
                moe(|moe| (moe.num_expert_groups, moe.num_limited_groups) = (Some(3), Some(1))),
                "moe_args.num_expert_groups moe_args.num_experts",
            ),
            (
                moe(|moe| (moe.num_expert_groups, moe.num_limited_groups) = (Some(2), Some(3))),
                "moe_args.num_expert_groups moe_args.num_limited_groups",
            ),
            (
                moe(|moe| (moe.num_expert_groups, moe.num_limited_groups, moe.top_k) = (Some(4), Some(1), 3)),
                "moe_args.top_k moe_args.num_limited_groups moe_args.num_expert_groups",
            ),
        ];
        let of_patterns = [
            ("attention_pattern = ['sliding', 'full']", "attention_pattern sliding_window"),
            ("sliding_window = 64", "attention_pattern sliding_window"),
            ("attention_pattern = ['chunked']", "attention_pattern fixed_attn_block_size"),
            ("local_rope_theta = 1e4", "local_rope_theta attention_pattern"),
            ("every_n_layers_nope = 4\nrope_pattern = [true]", "rope_pattern every_n_layers_nope"),
            ("attn_temperature_tuning = true", "attn_temperature_tuning rope_pattern every_n_layers_nope"),
            ("rope_pattern = [false]\nqk_unit_norm = true", "qk_unit_norm rope_pattern kv_lora_rank"),
            ("latent_pattern = [true, false]", "latent_pattern kv_lora_rank"),
            ("feed_forward_pattern = ['moe']", "feed_forward_pattern moe_args moe_enabled"),
            (
                "feed_forward_pattern = ['geglu']\nn_dense_layers = 1",
                "feed_forward_pattern interleave_moe_layer_step n_dense_layers",
            ),
            ("norm_type = 'layer_norm'\nzero_centered_norms = true", "zero_centered_norms norm_type"),
            ("qk_norm_over = 'projection'", "qk_norm_over qk_norm"),
            ("kv_lora_rank = 64\nattention_bias = true", "attention_bias attention_out_bias kv_lora_rank"),
        ];
        let cases = cases.into_iter().chain(of_patterns.map(|(toml, keys)| (with(toml), keys)));
        for (args, keys) in cases {
            let found: Vec<_> = args.clashes().iter().map(|clash| clash.keys.join(" ")).collect();
            assert_eq!(found, [keys]);
        }
    }
}
