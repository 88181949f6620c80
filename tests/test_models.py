"""Tree attention on several model families, and the refusal of those it cannot serve exactly."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from taps.engine.jobs import PrefillJob, VerifyJob
from taps.engine.scheduling import StepBudget
from taps.engine.target import Target
from taps.models.cache import CachedSequence, CacheFull, Kept, PagedCache
from taps.models.causal_lm import CausalLM
from taps.models.pretrained import UnservableTarget, load_config, load_tokenizer
from taps.models.step import Segment
from taps.sampling import InvalidLogits, sample_rows
from taps.session import SessionState
from taps.shaping import SamplingParams
from taps.tree import ProposalTree
from taps.verdict import PromptTooLong, Verdict
from tests.fakes import random_tree

VOCAB = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "mistral with a sliding window": MistralConfig(**SIZES, sliding_window=12),
    "gemma2 with soft-capping": Gemma2Config(**SIZES, sliding_window=12, query_pre_attn_scalar=8),
    "gpt-oss with sinks": GptOssConfig(**SIZES, sliding_window=12, num_local_experts=4, num_experts_per_tok=2),
}
GREEDY = SamplingParams(temperature=0.0)
FROZEN = SamplingParams(temperature=1e-40)


def state(prompt: Sequence[int], sampling: SamplingParams = GREEDY) -> SessionState:
    return SessionState(tuple(prompt), sampling=sampling)


def build(config: PreTrainedConfig) -> Any:
    torch.manual_seed(0)
    auto: Any = AutoModelForCausalLM
    return auto.from_config(copy.deepcopy(config), dtype=torch.float32).eval()


def tokens(n: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1, VOCAB) for _ in range(n)]


def greedy(target: Target, prompt: list[int], new_tokens: int, seed: int) -> list[int]:
    """Decode with random trees, which propose rightly now and then."""
    rng = random.Random(seed)
    session = target.open()
    verdict = run(target, PrefillJob(session, state(prompt)))
    decided = list(verdict.tokens)
    while len(decided) < new_tokens:
        tree = random_tree(rng, num_nodes=12, root=decided[-1], vocab_size=VOCAB)
        decided += run(target, VerifyJob(session, tree)).tokens
    target.close(session)
    return decided[:new_tokens]


def run(target: Target, job: PrefillJob | VerifyJob) -> Verdict:
    while True:
        outcome = target.step([job])[0]
        if isinstance(outcome, Verdict):
            return outcome
        assert outcome is None


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_decoding_through_trees_equals_generate(family: str) -> None:
    model = build(FAMILIES[family])
    prompt = tokens(30)
    ids = torch.tensor([prompt])
    theirs = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20, eos_token_id=None
    )
    target = Target(CausalLM(model), max_sessions=2, max_len=128, budget=StepBudget(7, 32))
    assert greedy(target, prompt, 20, seed=1) == theirs[0, 30:].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tree_gives_the_logits_of_each_of_its_paths(family: str) -> None:
    model = CausalLM(build(FAMILIES[family]))
    prompt, tree = tokens(20), random_tree(random.Random(5), 10, root=3, vocab_size=VOCAB)
    cache = PagedCache(1, 128)
    sequence = cache.open()
    forward(model, cache, sequence, ProposalTree(tuple(prompt), tuple(range(-1, 19)), (0.0,) * 20, (0,) * 20))
    cache.commit([Kept(sequence, range(20))])
    together = forward(model, cache, sequence, tree)
    for node in range(len(tree)):
        alone = PagedCache(1, 128)
        path = [*prompt, 3, *tree.token_path(node)]
        chain = ProposalTree(tuple(path), tuple(range(-1, len(path) - 1)), (0.0,) * len(path), (0,) * len(path))
        assert torch.allclose(together[node], forward(model, alone, alone.open(), chain)[-1], atol=5e-5)


def forward(model: CausalLM, cache: PagedCache, sequence: CachedSequence, tree: ProposalTree) -> torch.Tensor:
    cache.reserve(sequence, len(tree))
    paths = None if tree.is_chain else [tree.path(node) for node in range(len(tree))]
    return model.extend([Segment(sequence, len(tree), paths)], tree.tokens, range(len(tree)), cache)[1]


def test_sessions_in_one_pass_get_what_they_get_alone() -> None:
    model = CausalLM(build(FAMILIES["llama"]))
    prompts = [tokens(n, seed=n) for n in (5, 17, 40)]
    alone = []
    for prompt in prompts:
        target = Target(model, 1, 128)
        alone.append(run(target, PrefillJob(target.open(), state(prompt))))
    target = Target(model, 3, 128, StepBudget(prefill_tokens=16, tree_nodes=8))
    jobs = [PrefillJob(target.open(), state(prompt)) for prompt in prompts]
    done: dict[int, Verdict] = {}
    while len(done) < 3:
        waiting = [i for i in range(3) if i not in done]
        for i, outcome in zip(waiting, target.step([jobs[i] for i in waiting]), strict=True):
            if isinstance(outcome, Verdict):
                done[i] = outcome
    for i, verdict in enumerate(alone):
        assert done[i].tokens == verdict.tokens
        assert torch.allclose(done[i].features, verdict.features, atol=5e-5)


def test_prefill_returns_only_the_newest_features() -> None:
    model = CausalLM(build(FAMILIES["llama"]))
    target = Target(model, 2, 128, StepBudget(prefill_tokens=7))
    every = run(target, PrefillJob(target.open(), state(tokens(30))))
    newest = run(target, PrefillJob(target.open(), state(tokens(30)), feature_window=10))
    assert len(every.features) == 30
    assert torch.allclose(newest.features, every.features[-10:], atol=5e-5)


def test_too_long_a_prompt_fails_alone() -> None:
    target = Target(CausalLM(build(FAMILIES["llama"])), 2, 64, StepBudget(tree_nodes=8))
    long, short = PrefillJob(target.open(), state(tokens(60))), PrefillJob(target.open(), state(tokens(6)))
    failed, answered = target.step([long, short])
    assert isinstance(failed, PromptTooLong)
    assert isinstance(answered, Verdict)


def test_what_cannot_be_sampled_fails_alone() -> None:
    target = Target(CausalLM(build(FAMILIES["llama"])), 2, 64, StepBudget(tree_nodes=8))
    frozen = PrefillJob(target.open(), state(tokens(6), FROZEN))
    failed, answered = target.step([frozen, PrefillJob(target.open(), state(tokens(6)))])
    assert isinstance(failed, InvalidLogits)
    assert isinstance(answered, Verdict)


def decode_together(target: Target, prompts: list[list[int]], trees: int, late: bool) -> list[list[int]]:
    """Decode sessions in shared passes with trees they would have alone; the last one may join later."""
    params = [GREEDY, SamplingParams(seed=1), SamplingParams(0.8, top_p=0.9, presence_penalty=0.5, seed=2)]
    sessions = [target.open() for _ in prompts]
    decided: list[list[int]] = [[] for _ in prompts]
    while any(len(own) < trees for own in decided):
        jobs: dict[int, PrefillJob | VerifyJob] = {}
        for i, own in enumerate(decided):
            tree = random_tree(random.Random(f"{i} {own}"), 12, root=own[-1] if own else 0, vocab_size=VOCAB)
            if own:
                jobs[i] = VerifyJob(sessions[i], tree)
            elif not late or i == 0 or decided[i - 1]:
                jobs[i] = PrefillJob(sessions[i], state(prompts[i], params[i]))
        for i, outcome in zip(jobs, target.step(list(jobs.values())), strict=True):
            assert isinstance(outcome, Verdict)
            decided[i] += outcome.tokens
    return [own[:trees] for own in decided]


def test_prompts_and_trees_decided_in_one_pass_decide_what_they_do_apart() -> None:
    model = CausalLM(build(FAMILIES["llama"]))
    prompts = [tokens(n, seed=n) for n in (9, 5, 21)]
    budget = StepBudget(prefill_tokens=64, tree_nodes=64)
    together = decode_together(Target(model, 3, 256, budget), prompts, 10, late=False)
    assert decode_together(Target(model, 3, 256, budget), prompts, 10, late=True) == together


def test_a_pass_is_decided_once_a_level_however_many_sessions_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    levels: list[int] = []

    def counted(logits: torch.Tensor, *others: Any) -> list[int | InvalidLogits]:
        levels.append(len(logits))
        return sample_rows(logits, *others)

    monkeypatch.setattr("taps.engine.deciding.sample_rows", counted)
    target = Target(CausalLM(build(FAMILIES["llama"])), 8, 64, StepBudget(tree_nodes=8))
    sessions = [target.open() for _ in range(5)]
    roots = [run(target, PrefillJob(session, state(tokens(6)))).tokens[0] for session in sessions]
    levels.clear()
    trees = [ProposalTree.root_only(root) for root in roots]
    jobs: list[PrefillJob | VerifyJob] = [VerifyJob(*one) for one in zip(sessions, trees, strict=True)]
    verdicts = target.step([*jobs, PrefillJob(target.open(), state(tokens(7)))])
    assert levels == [6]
    assert all(isinstance(verdict, Verdict) for verdict in verdicts)


def test_a_tree_that_cannot_be_decided_leaves_its_session_and_the_others_as_they_were() -> None:
    target = Target(CausalLM(build(FAMILIES["llama"])), 2, 64, StepBudget(tree_nodes=8))
    fine, spoilt = target.open(), target.open()
    roots = [run(target, PrefillJob(session, state(tokens(6)))).tokens[0] for session in (fine, spoilt)]
    trees = [ProposalTree.root_only(root) for root in roots]
    jobs = [VerifyJob(fine, trees[0]), VerifyJob(spoilt, trees[1])]
    spoilt.asked = replace(spoilt.asked, sampling=FROZEN)
    answered, failed = target.step(jobs)
    assert isinstance(answered, Verdict)
    assert isinstance(failed, InvalidLogits)
    assert (fine.sequence.length, spoilt.sequence.length) == (7, 6)
    spoilt.asked = replace(spoilt.asked, sampling=GREEDY)
    assert run(target, jobs[1]).tokens == answered.tokens


def test_features_of_a_verdict_keep_alive_the_accepted_rows_alone() -> None:
    target = Target(CausalLM(build(FAMILIES["llama"])), 2, 64, StepBudget(tree_nodes=8))
    sessions = [target.open() for _ in range(2)]
    roots = [run(target, PrefillJob(session, state(tokens(6)))).tokens[0] for session in sessions]
    trees = [random_tree(random.Random(3), 8, root=root, vocab_size=VOCAB) for root in roots]
    verdicts = target.step([VerifyJob(*one) for one in zip(sessions, trees, strict=True)])
    features = [verdict.features for verdict in verdicts if isinstance(verdict, Verdict)]
    assert [len(own) for own in features] == [session.sequence.length - 6 for session in sessions]
    assert features[0].untyped_storage().nbytes() <= sum(own.nbytes for own in features)


def test_slots_are_bounded_and_come_back() -> None:
    target = Target(CausalLM(build(FAMILIES["llama"])), 1, 64)
    session = target.open()
    with pytest.raises(CacheFull):
        target.open()
    target.close(session)
    target.close(target.open())


@pytest.mark.parametrize(
    "config",
    [
        BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4),
        MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2),
    ],
    ids=["bloom", "mamba"],
)
@pytest.mark.filterwarnings("ignore")  # these families warn about kernels they would like
def test_a_target_that_cannot_be_served_is_refused_with_a_reason(config: PreTrainedConfig) -> None:
    with pytest.raises(UnservableTarget, match=r"Bloom|Mamba"):
        CausalLM(build(config))


def test_a_missing_target_is_refused_with_a_reason(tmp_path: Any) -> None:
    with pytest.raises(UnservableTarget, match="cannot load the causal LM of the target"):
        CausalLM.load(tmp_path, torch.float32)


@pytest.mark.parametrize(
    "config", ["null", "[]", "{", '{"model_type": "llama", "hidden_size": "576"}', '{"model_type": 5}']
)
def test_a_broken_target_is_refused_in_one_line(config: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config)
    for load in (load_tokenizer, load_config, lambda path: CausalLM.load(path, torch.float32)):
        with pytest.raises(UnservableTarget, match="cannot load") as caught:
            load(tmp_path)
        assert "\n" not in str(caught.value)
