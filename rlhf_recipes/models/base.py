"""One frozen base with named adapters, and every adapter switch; `role.py` runs them.

With LoRA the policy, the reference, the reward model and the value model are adapters on the same
base: `Base.open` adds one and hands out a `Role` that sees the base through it. With `lora = false`
each role is a model of its own. Nothing else in the project knows which of the two it is.

PEFT's own switches flip `requires_grad`: flipped between forward and backward, gradients are
dropped (TRL-facts 33). `Role.active` therefore sets the active adapter on the LoRA layers and
touches nothing else; who is trainable is decided once, in `open`. A forward and its backward run
under the same `active`, so that a checkpointed layer recomputes under the adapter it ran with.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from rlhf_recipes import group
from rlhf_recipes.errors import ModelError, lost
from rlhf_recipes.models import load as models
from rlhf_recipes.models.lean_lora import LeanLora
from rlhf_recipes.models.role import Role

ADAPTER = "adapter_model.safetensors"
HEAD = "head.safetensors"
UNIT = "unit.json"


class Base:
    """The base model of a run, read from disk once.

    `lora` holds LoraConfig's keywords, or is None: then every role loads weights of its own.
    """

    def __init__(self, load: Any, lora: dict[str, Any] | None, dtype: torch.dtype):
        self._load = load  # load(source folder or None for the base itself) -> PreTrainedModel
        self.lora = lora
        self.dtype = dtype
        self.lm: PreTrainedModel | None = load(None) if lora is not None else None
        self.peft: PeftModel | None = None
        self._layers: list[BaseTunerLayer] = []
        self._lean = LeanLora()

    def open(
        self,
        name: str,
        source: Path | None,
        *,
        seed: int,
        trainable: bool = False,
        adapter: bool = False,
    ) -> Role:
        """A role that starts from the output folder `source`, or from the base where it is None.

        `name` is the adapter's; `seed` fixes what is not read from `source`. With LoRA and neither
        a source nor training, the role is the bare base itself, unless an `adapter` is asked for.
        """
        if self.lora is None:
            lm = self._load(source)
            lm.requires_grad_(trainable)
            return Role(lm, None, self.dtype)
        if source is None and not trainable and not adapter:
            return Role(self.lm, None, self.dtype, self._layers, self._lean)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._add(name)
        if source is not None:
            state = load_file(source / ADAPTER, device=str(self.lm.device))
            set_peft_model_state_dict(self.peft, state, adapter_name=name)
        for key, parameter in self.peft.named_parameters():
            if f".{name}." in key:
                parameter.requires_grad_(trainable)
        self.lm.eval()  # a new adapter's dropout is on: whoever trains switches it on
        return Role(self.lm, name, self.dtype, self._layers, self._lean)

    def close(self, *roles: Role) -> None:
        """Take the roles' adapters off the base, and what a stock trainer hung on it.

        A role that is a model of its own is gone.
        """
        for role in roles:
            role.lm.gradient_checkpointing_disable()
            # accelerate wraps `forward` and SFTTrainer's chunked loss replaces it, both on the
            # instance, and neither takes it back: the next stage would run their code. And a model
            # marked as prepared is not wrapped again: the next stage's logits would be bfloat16.
            for module in (role.lm, self.peft):
                if module is not None:
                    for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
                        module.__dict__.pop(name, None)
            # Enabling checkpointing hangs a hook here each time; DPOTrainer does so at every step.
            role.lm.get_input_embeddings()._forward_hooks.clear()
            role.lm.eval()
            models.without_router_logits(role.lm)
            if role.adapter is not None:
                for layer in self._layers:
                    layer._active_adapter = []
                self.peft.base_model.delete_adapter(role.adapter)
            if role.lm is not self.lm:
                models.empty(role.lm)

    def _add(self, name: str) -> None:
        if self.peft is None:
            check_targets(self.lm, self.lora["target_modules"])
        # PEFT writes the ranks of experts into what it is given, which is the recipe's.
        config = LoraConfig(task_type="CAUSAL_LM", **copy.deepcopy(self.lora))
        if self.peft is None:
            self.peft = get_peft_model(self.lm, config, adapter_name=name)
            self._layers.extend(m for m in self.lm.modules() if isinstance(m, BaseTunerLayer))
        else:
            self.peft.add_adapter(name, config)
            self.peft.active_adapter = name  # what PeftModel.forward looks up, and no more
        for layer in self._layers:
            if type(layer) is LoraLinear and name not in layer.lora_variant:
                layer.lora_variant[name] = self._lean
                layer.cast_input_dtype_enabled = False

    def save(self, role: Role, folder: Path) -> None:
        """Write the role's weights and head as safetensors, with what loads them again.

        Of a group the first process does.
        """
        if group.rank():
            return
        if self.lora is None:
            role.lm.save_pretrained(folder)
        else:
            state = get_peft_model_state_dict(self.peft, adapter_name=role.adapter)
            if not all(tensor.isfinite().all() for tensor in state.values()):
                raise lost("weights")
            save_file({k: v.contiguous() for k, v in sorted(state.items())}, folder / ADAPTER)
            config = self.peft.peft_config[role.adapter].to_dict()
            # PEFT writes this set in hash order, so two equal runs would give two files.
            config["target_modules"] = sorted(config["target_modules"])
            config["inference_mode"] = True
            config["base_model_name_or_path"] = None  # PEFT tells a base's first adapter alone
            text = json.dumps(config, indent=2, sort_keys=True, default=sorted)
            (folder / "adapter_config.json").write_text(text)
        if role.score is not None:
            save_file({"score.weight": role.score.weight.data.contiguous()}, folder / HEAD)


def check_targets(lm: PreTrainedModel, targets: Any) -> None:
    """Raise ModelError where a name of `target_modules` is none of the model: PEFT passes over it,
    as long as there is another."""
    if isinstance(targets, str):
        return
    names = [name for name, _ in lm.named_modules()]
    gone = [t for t in targets if not any(f".{name}".endswith(f".{t}") for name in names)]
    if gone:
        linear = {n.split(".")[-1] for n, m in lm.named_modules() if isinstance(m, torch.nn.Linear)}
        what = f"lora.target_modules names {', '.join(gone)}, and the model has no such layer"
        raise ModelError(what, f"its linear layers are {', '.join(sorted(linear))}")
