"""One base, several adapters: what is in memory, who moves, and what is scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

from rlhf_recipes.errors import ModelError
from rlhf_recipes.models import attention
from rlhf_recipes.models import role as role_module
from rlhf_recipes.models.attention import MatmulBackward
from rlhf_recipes.models.base import Base
from rlhf_recipes.models.load import load_causal_lm, new_head
from rlhf_recipes.models.role import LogProb, Role, logprobs, logprobs_and_values, score, values
from rlhf_recipes.models.sampling import Sequences, join
from tests.helpers.roles import make_base, trained

pytestmark = pytest.mark.train

CPU = torch.device("cpu")


def batch() -> Sequences:
    return join([[1, 4, 7, 5], [1, 4, 8, 9, 10, 5]], [[7, 8, 2], [12, 2]], 0, CPU)


def test_four_roles_hold_the_base_once(tiny_model: Path) -> None:
    base = make_base(tiny_model)
    size = {p.data_ptr(): p.numel() for p in base.lm.parameters()}
    roles = [trained(base, name) for name in ("policy", "reference", "reward", "value")]
    now = {p.data_ptr(): p.numel() for role in roles for p in role.parameters()}
    adapter = sum(p.numel() for p in roles[0].trainable())
    assert sum(now.values()) == sum(size.values()) + 4 * adapter
    assert set(size) <= set(now)


def test_a_role_sees_its_own_adapter_and_closing_leaves_the_base(tiny_model: Path) -> None:
    base, rows = make_base(tiny_model), batch()
    bare = base.open("bare", None, seed=0)
    first, second = trained(base, "policy", 1), trained(base, "value", 2)

    def read(role: Role) -> torch.Tensor:
        with role.active(), torch.no_grad():
            return logprobs(role, rows.ids, rows.mask, rows.answer, 1.0)[0]

    before = read(bare)
    assert not torch.allclose(read(first), read(second), atol=1e-3)
    assert not torch.allclose(read(first), before, atol=1e-3)
    base.close(first, second)
    again = base.open("policy", None, seed=3)
    assert torch.equal(read(again), before)
    assert not [name for name, _ in base.lm.named_parameters() if "policy" in name]


@pytest.mark.parametrize("lora", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_a_saved_adapter_is_the_same_adapter(tiny_model: Path, tmp_path: Path, lora: dict) -> None:
    base, rows = make_base(tiny_model, **lora), batch()
    role = trained(base, "policy")
    with role.active(), torch.no_grad():
        before = logprobs(role, rows.ids, rows.mask, rows.answer, 1.0)[0]
    base.save(role, tmp_path)
    base.close(role)
    for name in ("reference", "policy"):
        again = base.open(name, tmp_path, seed=9)
        with again.active(), torch.no_grad():
            assert torch.equal(logprobs(again, rows.ids, rows.mask, rows.answer, 1.0)[0], before)
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_what_is_opened_is_read_without_dropout(tiny_model: Path, tmp_path: Path) -> None:
    """PEFT adds an adapter that is ready to train; who trains says so itself."""
    base, rows = make_base(tiny_model, lora_dropout=0.5), batch()
    base.save(trained(base, "policy"), tmp_path)
    again = base.open("start", tmp_path, seed=0)
    with again.active(), torch.no_grad():
        first, second = (logprobs(again, rows.ids, rows.mask, rows.answer, 1.0)[0] for _ in "12")
    assert torch.equal(first, second)


def test_switching_between_forward_and_backward_of_another_role_drops_no_gradient(
    tiny_model: Path,
) -> None:
    """PEFT's own switch flips requires_grad; ours must not (TRL-facts 33)."""
    base, rows = make_base(tiny_model), batch()
    policy, value = trained(base, "policy", 1), trained(base, "value", 2)
    value.add_head(new_head(value.lm))
    reference = base.open("bare", None, seed=0)
    with value.active():
        loss = values(value, rows.ids, rows.mask, rows.answer).sum()
    with policy.active(), torch.no_grad():
        logprobs(policy, rows.ids, rows.mask, rows.answer, 1.0)
    with reference.active(), torch.no_grad():
        logprobs(reference, rows.ids, rows.mask, rows.answer, 1.0)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in value.trainable())
    assert all(p.grad is None for p in policy.trainable())
    assert all(p.grad is None for name, p in base.lm.named_parameters() if "lora" not in name)


def gradients(base: Base, policy: Role, value: Role, rows: Sequences) -> list[torch.Tensor]:
    for role in (policy, value):
        for parameter in role.trainable():
            parameter.grad = None
    with policy.active():
        logprobs(policy, rows.ids, rows.mask, rows.answer, 1.0)[0].sum().backward()
    with value.active():
        values(value, rows.ids, rows.mask, rows.answer).sum().backward()
    return [p.grad.clone() for p in (*policy.trainable(), *value.trainable())]


def test_checkpointing_changes_no_gradient(tiny_model: Path) -> None:
    base, rows = make_base(tiny_model), batch()
    policy, value = trained(base, "policy", 1), trained(base, "value", 2)
    value.add_head(new_head(value.lm))
    plain = gradients(base, policy, value, rows)
    base.lm.train()
    base.lm.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed = gradients(base, policy, value, rows)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, checkpointed, strict=True))


def test_the_score_is_at_eos_and_does_not_see_padding(tiny_model: Path) -> None:
    """Left- or right-padded, alone or in a batch: the logit that RewardTrainer trains."""
    base, rows = make_base(tiny_model), batch()
    reward = trained(base, "reward")
    reward.add_head(new_head(reward.lm))
    with reward.active(), torch.no_grad():
        ours = score(reward, rows.ids, rows.mask, rows.last)
    right = torch.tensor([[1, 4, 7, 5, 7, 8, 2, 0], [1, 4, 8, 9, 10, 5, 12, 2]])
    with torch.no_grad():
        stock = reward(input_ids=right, attention_mask=(right != 0).long()).logits.squeeze(-1)
    assert torch.allclose(ours, stock, atol=1e-5)
    assert rows.ids[torch.arange(2), rows.last].tolist() == [2, 2]


def test_logprobs_are_the_models_own(tiny_model: Path) -> None:
    """Against a plain forward of one unpadded row, at temperature 0.7."""
    base, rows = make_base(tiny_model), batch()
    policy = trained(base, "policy")
    alone = torch.tensor([[1, 4, 7, 5, 7, 8, 2]])
    with policy.active(), torch.no_grad():
        ours, entropy = logprobs(policy, rows.ids, rows.mask, rows.answer, 0.7)
        plain = torch.log_softmax(base.lm(input_ids=alone).logits[0, 3:6] / 0.7, -1)
    assert torch.allclose(ours[0], plain[range(3), [7, 8, 2]], atol=1e-5)
    assert torch.allclose(entropy[0], -(plain.exp() * plain).sum(-1), atol=1e-5)


def test_lean_lora_is_pefts_own(tiny_model: Path) -> None:
    """Outputs and gradients, at a scaling that rounds."""
    rows, found = batch(), []
    for lean in (True, False):
        base = make_base(tiny_model, lora_alpha=7)
        role = trained(base, "policy")
        for layer in base._layers:
            assert layer.lora_variant
            if not lean:
                layer.lora_variant.clear()
        with role.active():
            out = logprobs(role, rows.ids, rows.mask, rows.answer, 1.0)[0]
            out.sum().backward()
        found.append([out.detach(), *(p.grad for p in role.trainable())])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_pass_for_two_roles_gives_what_two_passes_give(
    tiny_model: Path, checkpointing: bool
) -> None:
    """Outputs and gradients of policy and value, at a scaling that rounds."""
    base, rows = make_base(tiny_model, lora_alpha=7), batch()
    policy, value = trained(base, "policy", 1), trained(base, "value", 2)
    torch.manual_seed(0)
    value.add_head(new_head(value.lm))
    tokens, found = (rows.ids, rows.mask, rows.answer), []
    assert policy.pairs_with(value)
    if checkpointing:  # the backward then recomputes, under the pair that it was computed under
        base.lm.gradient_checkpointing_enable({"use_reentrant": False})
        base.lm.train()
    for together in (True, False):
        if together:
            with policy.active(beside=value):
                new, entropy, guess = logprobs_and_values(policy, value, *tokens, 0.7)
                (new.sum() + guess.square().sum()).backward()
        else:
            with policy.active():
                new, entropy = logprobs(policy, *tokens, 0.7)
                new.sum().backward()
            with value.active():
                guess = values(value, *tokens)
                guess.square().sum().backward()
        weights = [*policy.trainable(), *value.trainable()]
        found.append([new.detach(), entropy, guess.detach(), *(p.grad for p in weights)])
        for parameter in weights:
            parameter.grad = None
    torch.testing.assert_close(*found)


def test_lean_lora_in_16_bit_is_pefts_own(tiny_model: Path) -> None:
    """Under autocast, through dropout's identity, rows that are not contiguous and a scaling."""
    base = make_base(tiny_model, torch.bfloat16, lora_alpha=7)
    role, found = trained(base, "policy"), []
    layer = base._layers[0]
    x = torch.randn(5, 3, layer.in_features, dtype=torch.bfloat16).transpose(0, 1)
    for lean in (True, False):
        if not lean:
            layer.lora_variant.clear()
        with role.active():
            out = layer(x)
            grads = torch.autograd.grad(out.float().square().sum(), list(layer.lora_B.parameters()))
        found.append([out, *grads])
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).norm() < 0.01 * theirs.norm()


def test_a_pass_inside_a_pass_for_two_is_for_one(tiny_model: Path) -> None:
    base, rows = make_base(tiny_model), batch()
    policy, value = trained(base, "policy", 1), trained(base, "value", 2)
    tokens = (rows.ids, rows.mask, rows.answer, 1.0)
    with policy.active():
        alone = logprobs(policy, *tokens)[0]
    with policy.active(beside=value), policy.active():
        assert torch.equal(logprobs(policy, *tokens)[0], alone)


def test_dora_and_whole_models_take_a_pass_each(tiny_model: Path) -> None:
    base = make_base(tiny_model, use_dora=True)
    policy, value = trained(base, "policy", 1), trained(base, "value", 2)
    assert not policy.pairs_with(value)
    base = Base(lambda _: load_causal_lm(tiny_model, dtype=torch.float32), None, torch.float32)
    whole = [base.open(name, None, seed=0, trainable=True) for name in ("policy", "value")]
    assert not whole[0].pairs_with(whole[1])


def test_log_probabilities_have_the_gradient_of_log_softmax() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 4, 50)
    logits[0, 1, 7] = -torch.inf
    logits.requires_grad_()
    chosen, weight = torch.randint(8, 50, (3, 4)), torch.randn(3, 4)
    ours, entropy = LogProb.apply(logits, chosen, 0.7)
    log_p = torch.log_softmax(logits / 0.7, -1)
    theirs = log_p.gather(-1, chosen[..., None])[..., 0]
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(entropy, torch.special.entr(log_p.exp()).sum(-1))
    grads = [torch.autograd.grad((out * weight).sum(), logits)[0] for out in (ours, theirs)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("key_heads", [2, 4])
@pytest.mark.parametrize("rows", [1, 3])
def test_attentions_backward_is_torchs(
    key_heads: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "CACHED", rows * 4 * 11**2)
    torch.manual_seed(0)
    query = torch.randn(3, 4, 11, 8, requires_grad=True)
    key, value = (torch.randn(3, key_heads, 11, 8, requires_grad=True) for _ in range(2))
    mask = torch.ones(3, 1, 11, 11, dtype=torch.bool).tril()
    mask[1, :, :, :4] = False  # left padding, whose own rows look at nothing
    weight = torch.randn(3, 4, 11, 8)
    weight[1, :, :4] = 0.0  # and are read by nobody
    ours = MatmulBackward.apply(query, key, value, mask, 0.3)
    theirs = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(ours, theirs)
    inputs = (query, key, value)
    grads = [torch.autograd.grad((out * weight).sum(), inputs) for out in (ours, theirs)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("shared", [0.0, 100.0])
def test_attentions_gradient_in_16_bit_is_near_the_true_one(shared: float) -> None:
    """Also where all keys have much in common, as a bias on them makes them have."""
    torch.manual_seed(0)
    query, key, value, weight = torch.randn(4, 2, 3, 40, 16, dtype=torch.float64).unbind()
    key = key + shared
    mask = torch.ones(2, 1, 40, 40, dtype=torch.bool).tril()
    grads = []
    for dtype in (torch.bfloat16, torch.float64):
        inputs = [t.bfloat16().to(dtype).requires_grad_() for t in (query, key, value)]
        out = MatmulBackward.apply(*inputs, mask, 0.25)
        grads.append(torch.autograd.grad((out * weight.to(dtype)).sum(), inputs))
    for ours, true in zip(*grads, strict=True):
        assert (ours - true).norm() < 0.02 * true.norm()


def test_a_16_bit_model_trains_with_it_and_no_other(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    plain = attention._backward
    monkeypatch.setattr(
        attention, "_backward", lambda *parts: calls.append(len(parts)) or plain(*parts)
    )
    for dtype, count in ((torch.bfloat16, 2), (torch.float32, 0)):
        base = make_base(tiny_model, dtype)
        role, rows = trained(base, "policy"), batch()
        with role.active():
            logprobs(role, rows.ids, rows.mask, rows.answer, 1.0)[0].sum().backward()
        assert len(calls) == count  # one a layer
        calls.clear()


def test_a_target_that_the_model_lacks_is_named_with_those_it_has(tiny_model: Path) -> None:
    """PEFT says nothing of one name among others."""
    lora = {"r": 2, "target_modules": ["q_proj", "W_pack"]}
    base = Base(lambda _: load_causal_lm(tiny_model, dtype=torch.float32), lora, torch.float32)
    with pytest.raises(ModelError) as error:
        base.open("policy", None, seed=0, trainable=True)
    assert "target_modules names W_pack" in str(error.value) and "v_proj" in error.value.hint


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation made."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple | list) else [made]:
            if isinstance(one, torch.Tensor):
                self.most = max(self.most, one.numel())
        return made


@pytest.mark.parametrize(("together", "caps"), [(False, False), (True, False), (True, True)])
def test_the_logits_of_a_large_vocabulary_are_never_there_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: bool, caps: bool
) -> None:
    words, rows, answer = 152_000, 3, 12
    shape = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    shape |= dict(num_key_value_heads=2, vocab_size=words, head_dim=4)
    config = Gemma2Config(**shape) if caps else LlamaConfig(**shape)
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    base = Base(lambda _: lm, {"r": 2, "target_modules": ["q_proj"]}, torch.float32)
    policy, value = (base.open(name, None, seed=1, trainable=True) for name in ("policy", "value"))
    value.add_head(new_head(value.lm, bias=True))
    ids = torch.randint(1, words, (rows, answer + 2))
    given = ids, torch.ones_like(ids), answer, 0.7
    monkeypatch.setattr(role_module, "PART", 2**21)

    def run(large: int) -> tuple[list[torch.Tensor], int]:
        monkeypatch.setattr(role_module, "LARGE", large)
        with Largest() as seen:
            if together:
                with policy.active(beside=value):
                    picked, entropy, _ = logprobs_and_values(policy, value, *given)
                    picked.sum().backward()
            else:
                with policy.active():
                    picked, entropy = logprobs(policy, *given)
                    picked.sum().backward()
            with policy.active(), torch.no_grad():
                assert (logprobs(policy, *given)[0] - picked).abs().max() < 1e-5
        found = [picked, entropy, *(p.grad for p in policy.trainable())]
        for weight in policy.trainable():
            weight.grad = None
        return [one.detach() for one in found if one is not None], seen.most

    whole, most = run(large=2**20)
    parts, less = run(large=2**16)
    assert most == rows * answer * words
    assert less == most if caps else less <= 2**21 < most
    assert len(whole) == len(parts) >= 4  # with the gradients of A and B
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
