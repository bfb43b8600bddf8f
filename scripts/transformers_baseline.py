"""Best of n with transformers on weights exported from recexplore: what the benchmark compares to.

Two ways: `generate` followed by a reward pass, as in any tutorial; and the same work with every
cache reused by hand.
"""

import contextlib
import copy
import os
from typing import NamedTuple

import benchmark_costs
import numpy as np

from recexplore.models.transformer import TransformerConfig

try:
    import torch
    import transformers
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, LlamaModel
    from transformers.cache_utils import DynamicCache
except ImportError as error:
    raise SystemExit(
        f"The transformers side of this benchmark needs torch and transformers ({error}). "
        "Install them: pip install 'recexplore[bench]'"
    ) from error


class Baseline(NamedTuple):
    """The pair in torch.

    Attributes:
      novelty: the language model.
      alignment: the reward model's transformer.
      head: [D], its scalar head.
      bias: [], likewise.
    """

    novelty: LlamaForCausalLM
    alignment: LlamaModel
    head: torch.Tensor
    bias: torch.Tensor


class Prompt(NamedTuple):
    """A prefix shared by the batch and B histories, with the prefix's caches.

    Attributes:
      prefix: [P] tokens.
      histories: [B, S] tokens.
      novelty_cache: the novelty model's keys and values of the prefix, batch 1.
      alignment_cache: the alignment model's.
    """

    prefix: torch.Tensor
    histories: torch.Tensor
    novelty_cache: DynamicCache
    alignment_cache: DynamicCache

    def whole(self) -> torch.Tensor:
        """[B, P + S]: prefix and history."""
        repeated = self.prefix[None].expand(len(self.histories), -1)
        return torch.cat([repeated, self.histories], dim=1)


def export(config: TransformerConfig, novelty_params: dict, alignment_params: dict) -> Baseline:
    """Copies the weights of both models to transformers' Llama layout, in float32.

    Args:
      config: of both networks; without windows, soft-caps or an output table of its own, which
        Llama doesn't have.
      novelty_params: variables of a `Transformer`.
      alignment_params: variables of a `RewardModel`.
    """
    novelty = LlamaForCausalLM(_llama_config(config)).eval()
    alignment = LlamaModel(_llama_config(config)).eval()
    reward = alignment_params["params"]
    novelty.load_state_dict(
        {f"model.{name}": x for name, x in _llama_state(novelty_params["params"]).items()}
        | {"lm_head.weight": _tensor(novelty_params["params"]["token_embedder"])}
    )
    alignment.load_state_dict(_llama_state(reward["transformer"]))
    return Baseline(novelty, alignment, _tensor(reward["head"]), _tensor(reward["bias"]))


@torch.inference_mode()
def prompt(baseline: Baseline, prefix: np.ndarray, histories: np.ndarray) -> Prompt:
    """Runs both models over the prefix; this is done once and not timed."""
    prefix_tokens = torch.tensor(prefix, dtype=torch.long)
    caches = []
    for model in (baseline.novelty.model, baseline.alignment):
        caches.append(DynamicCache())
        model(prefix_tokens[None], past_key_values=caches[-1], use_cache=True)
    return Prompt(prefix_tokens, torch.tensor(histories, dtype=torch.long), *caches)


@torch.inference_mode()
def generate_then_score(
    baseline: Baseline, prompt: Prompt, num_samples: int, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What users do today: `generate` with n return sequences, then one reward pass over them.

    Returns:
      Sequences [B * n, P + S + T] and their scores [B * n].
    """
    whole = prompt.whole()
    settings = GenerationConfig(
        do_sample=True,
        top_k=0,
        num_return_sequences=num_samples,
        min_new_tokens=length,
        max_new_tokens=length,
        eos_token_id=None,
        pad_token_id=0,
    )
    sequences = baseline.novelty.generate(
        whole, attention_mask=torch.ones_like(whole), generation_config=settings
    )
    return sequences, score_sequences(baseline, sequences)


@torch.inference_mode()
def score_sequences(baseline: Baseline, sequences: torch.Tensor) -> torch.Tensor:
    """Scores of whole sequences [B, T] of one length in a plain forward pass."""
    hidden = baseline.alignment(sequences, use_cache=False).last_hidden_state
    return hidden[:, -1] @ baseline.head + baseline.bias


@torch.inference_mode()
def reuse_caches(
    baseline: Baseline, prompt: Prompt, num_samples: int, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with the caches reused by hand: each prompt is run once, the prefix not at all.

    Returns:
      Descriptions [B * n, T] and their scores [B * n].
    """
    with _grouped_attention():
        descriptions = _sample_with_cache(baseline, prompt, num_samples, length)
        return descriptions, _score_with_cache(baseline, prompt, num_samples, descriptions)


def _sample_with_cache(baseline, prompt, num_samples, length) -> torch.Tensor:
    cache = _expanded(prompt.novelty_cache, len(prompt.histories))
    out = baseline.novelty(prompt.histories, past_key_values=cache, logits_to_keep=1)
    cache.batch_repeat_interleave(num_samples)
    first = torch.softmax(out.logits[:, -1], dim=-1)
    tokens = [torch.multinomial(first, num_samples, replacement=True).reshape(-1, 1)]
    for _ in range(length - 1):
        out = baseline.novelty(tokens[-1], past_key_values=cache)
        tokens.append(torch.multinomial(torch.softmax(out.logits[:, -1], dim=-1), 1))
    return torch.cat(tokens, dim=1)


def _score_with_cache(baseline, prompt, num_samples, descriptions) -> torch.Tensor:
    cache = _expanded(prompt.alignment_cache, len(prompt.histories))
    baseline.alignment(prompt.histories, past_key_values=cache)
    cache.batch_repeat_interleave(num_samples)
    hidden = baseline.alignment(descriptions, past_key_values=cache).last_hidden_state
    return hidden[:, -1] @ baseline.head + baseline.bias


@torch.inference_mode()
def logits(baseline: Baseline, tokens: np.ndarray) -> np.ndarray:
    """Logits [B, T, V] of the next token at every position."""
    return baseline.novelty(torch.tensor(tokens, dtype=torch.long)).logits.numpy()


def scores(baseline: Baseline, tokens: np.ndarray) -> np.ndarray:
    """Scores [B] of whole sequences [B, T]."""
    return score_sequences(baseline, torch.tensor(tokens, dtype=torch.long)).numpy()


def largest_difference_of_cached_scores(
    baseline: Baseline, prompt: Prompt, num_samples: int, length: int
) -> float:
    """How far the scores from reused caches are from a plain pass over the same sequences."""
    descriptions, cached = reuse_caches(baseline, prompt, num_samples, length)
    whole = prompt.whole().repeat_interleave(num_samples, dim=0)
    plain = score_sequences(baseline, torch.cat([whole, descriptions], dim=1))
    return float((plain - cached).abs().max())


@torch.inference_mode()
def matmul_rate(config: TransformerConfig, num_threads: int) -> float:
    """The best of torch's matrix products, in operations a second, on as many threads as JAX's."""
    torch.set_num_threads(num_threads)
    return benchmark_costs.matmul_rate(config, torch.randn, torch.matmul)


def versions() -> dict[str, str]:
    """Of torch and transformers."""
    return {"torch": torch.__version__, "transformers": transformers.__version__}


@contextlib.contextmanager
def _grouped_attention():
    """Attention without a copy of the keys for every query head; some 15 % faster here."""
    name = "TRANSFORMERS_SDPA_FORCE_GQA"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _expanded(cache: DynamicCache, batch: int) -> DynamicCache:
    """The cache for a whole batch; the prefix is not copied before something is appended."""
    wide = copy.copy(cache)
    wide.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in wide.layers:
        layer.keys = layer.keys.expand(batch, -1, -1, -1)
        layer.values = layer.values.expand(batch, -1, -1, -1)
    return wide


def _llama_config(config: TransformerConfig) -> LlamaConfig:
    if any(config.attention_windows) or config.attention_softcap or config.logit_softcap:
        raise ValueError("Llama has neither windows nor soft-caps; compare models without them.")
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.model_dim,
        intermediate_size=config.mlp_dim,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_length,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=config.tied_embeddings,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def _llama_state(params: dict) -> dict[str, torch.Tensor]:
    """Scanned layers [L, in…, out…] → one matrix [out, in] for each layer and projection."""
    state = {
        "embed_tokens.weight": _tensor(params["token_embedder"]),
        "norm.weight": _tensor(params["decoder_norm"]["scale"]),
    }
    layers = params["layers"]
    attention, mlp = layers["self_attention"], layers["mlp"]
    for index, scale in enumerate(np.asarray(layers["pre_attention_layer_norm"]["scale"])):
        name, width = f"layers.{index}", scale.shape[0]
        state[f"{name}.input_layernorm.weight"] = _tensor(scale)
        state[f"{name}.post_attention_layernorm.weight"] = _tensor(
            layers["pre_mlp_layer_norm"]["scale"][index]
        )
        for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v")):
            kernel = np.asarray(attention[ours][index]).reshape(width, -1)
            state[f"{name}.self_attn.{theirs}_proj.weight"] = _tensor(kernel.T)
        kernel = np.asarray(attention["out"][index]).reshape(-1, width)
        state[f"{name}.self_attn.o_proj.weight"] = _tensor(kernel.T)
        for ours, theirs in (("wi_0", "gate"), ("wi_1", "up"), ("wo", "down")):
            state[f"{name}.mlp.{theirs}_proj.weight"] = _tensor(np.asarray(mlp[ours][index]).T)
    return state


def _tensor(array) -> torch.Tensor:
    return torch.tensor(np.array(array, np.float32))
