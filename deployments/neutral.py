"""Which parameters ask for nothing: those that never change an answer, and those that have values which do not.

OpenAI's and the extensions of vLLM, SGLang and llama.cpp, whose clients send them filled in. `null` asks for
nothing under any name. Knows names and values; nothing of requests.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

Neutral = Mapping[str, Collection[Any]]

# Whatever their value: bookkeeping, scheduling, caching, and what only shapes a feature that is refused itself.
_OPENAI_FREE = """user metadata store service_tier safety_identifier prompt_cache_retention
    prompt_cache_options prediction moderation"""
_VLLM_FREE = """priority request_id session_id spaces_between_special_tokens truncation_side
    return_tokens_as_token_ids return_token_offsets return_mm_kwargs routed_experts_prompt_start stream_interval
    guided_decoding_backend guided_whitespace_pattern"""
_SGLANG_FREE = "rid extra_key custom_labels separate_reasoning stream_reasoning ngram_corpus_id routed_dp_rank"
_LLAMA_CPP_FREE = """cache_prompt id_slot n_keep n_discard n_cache_reuse sse_ping_interval repeat_last_n
    dry_base dry_allowed_length dry_penalty_last_n dry_sequence_breakers xtc_threshold mirostat_tau mirostat_eta
    dynatemp_exponent adaptive_decay post_sampling_probs parse_tool_calls backend_sampling"""
WITHOUT_EFFECT = frozenset(f"{_OPENAI_FREE} {_VLLM_FREE} {_SGLANG_FREE} {_LLAMA_CPP_FREE}".split())

_OPENAI: Neutral = {
    "suffix": ("",),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "verbosity": ("medium",),
}
_VLLM: Neutral = {
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "early_stopping": (False,),
    "include_stop_str_in_output": (False,),
    "logits_processors": ([],),
    "skip_special_tokens": (True,),
    "detokenize": (True,),
    "flat_logprobs": (False,),
    "return_prompt_text": (False,),
    "mm_processor_kwargs": ({},),
    "media_io_kwargs": ({},),
    "documents": ([],),
    "include_reasoning": (True,),
    "thinking_token_budget": (-1,),
    "watermarking": (False,),
    "kv_transfer_params": ({},),
    "ec_transfer_params": ({},),
    "vllm_xargs": ({},),
}
_SGLANG: Neutral = {
    "stop_regex": ("", []),
    "no_stop_trim": (False,),
    "session_params": ({},),
    "custom_params": ({},),
    "images_config": ({},),
    "use_audio_in_video": (False,),
    "return_hidden_states": (False,),
    "return_routed_experts": (False,),
    "routed_experts_start_len": (0,),
    "return_cached_tokens_details": (False,),
    "return_prompt_token_ids": (False,),
    "return_meta_info": (False,),
}
_LLAMA_CPP: Neutral = {
    "typical_p": (1,),
    "typ_p": (1,),
    "tfs_z": (1,),
    "top_n_sigma": (-1, 0),
    "min_keep": (0, 1),  # top-p and top-k keep one token at least
    "repeat_penalty": (1,),
    "penalize_nl": (False,),
    "dry_multiplier": (0,),
    "xtc_probability": (0,),
    "mirostat": (0,),
    "dynatemp_range": (0,),
    "adaptive_target": (-1,),
    "grammar": ("",),
    "grammar_lazy": (False,),
    "n_probs": (0,),
    "n_cmpl": (1,),
    "n_indent": (0,),
    "t_max_predict_ms": (-1, 0),
    "t_max_prompt_ms": (-1, 0),
    "return_tokens": (False,),
    "return_progress": (False,),
    "timings_per_token": (False,),
    "response_fields": ([],),
    "lora": ([],),
    "image_data": ([],),
    "reasoning_format": ("none", "auto"),
}
_EITHER: Neutral = {**_OPENAI, **_VLLM, **_SGLANG, **_LLAMA_CPP}
# The template writes a chat's special tokens, the tokenizer a completion's; a chat ends where it ends.
CHAT: Neutral = {**_EITHER, "add_special_tokens": (False,), "n_predict": (-1,), "echo": (False,)}
_OF_CHATS: Neutral = {
    "top_logprobs": (0,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template_kwargs": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
}
COMPLETION: Neutral = {**_EITHER, **_OF_CHATS, "add_special_tokens": (True,)}
STREAM_OPTIONS: Neutral = {"include_obfuscation": (True, False), "continuous_usage_stats": (False,)}
# Clients send our own answers back, filled in with what other servers answer.
MESSAGE: Collection[Any] = (False, "", [], {})


def asks_for_nothing(name: str, value: Any, neutral: Neutral) -> bool:
    """Whether the parameter, at this value, leaves every answer as it is."""
    return value is None or name in WITHOUT_EFFECT or is_one_of(said(value), neutral.get(name, ()))


def said(value: Any) -> Any:
    """A JSON object without its nulls; any other value as it is."""
    if not isinstance(value, dict):
        return value
    return {name: inside for name, inside in value.items() if inside is not None}


def is_one_of(value: Any, neutral: Collection[Any]) -> bool:
    """Numbers are compared by value; a boolean is not a number."""
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral)
