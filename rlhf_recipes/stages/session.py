"""What the stages of one run share, each loaded on first use: tokenizer, rows, base model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_recipes.recipe.kinds import JUDGE
from rlhf_recipes.recipe.tables import VLLM, is_path
from rlhf_recipes.recipe.wiring import columns_of, reads_dataset
from rlhf_recipes.sources import resolve as sources
from rlhf_recipes.sources import trust
from rlhf_recipes.store.fingerprint import foreign_models

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rlhf_recipes.data.dataset import Data
    from rlhf_recipes.data.tokens import Tokens
    from rlhf_recipes.data.turns import Messages
    from rlhf_recipes.models.base import Base
    from rlhf_recipes.models.role import Role
    from rlhf_recipes.models.vllm import Vllm
    from rlhf_recipes.recipe.load import Recipe
    from rlhf_recipes.recipe.tables import DatasetTable


class Session:
    """Holds nothing that a stage's result depends on beyond the recipe itself."""

    def __init__(self, recipe: Recipe, model: Mapping[str, str], runs: Path | None = None):
        self.recipe = recipe
        self.model = model  # the base model's identity, which says where it is loaded from
        self.runs = runs  # where encoded rows are kept; None: nowhere
        self.judged: Mapping[str, Sequence[Path]] = {}  # by stage: files of judgements it reads
        self._data: dict[str, Data] = {}

    def of(self, stage: str) -> Session:
        """The session of the base model that a stage is on: this one, or the judge's own."""
        model = self.recipe.model_of(stage)
        if model == self.recipe.model:
            return self
        self._judging.recipe, self._judging.judged = replace(self.recipe, model=model), self.judged
        return self._judging

    @cached_property
    def _judging(self) -> Session:
        return Session(self.recipe, {}, self.runs)

    @cached_property
    def model_folder(self) -> Path:
        return sources.base_folder(self.recipe, self.model)

    @cached_property
    def tokens(self) -> Tokens:
        trust.check_tokenizer(self.model_folder)
        from rlhf_recipes.data.tokens import settle
        from rlhf_recipes.models.load import check_base, load_config, load_tokenizer

        model, folder = self.recipe.model, self.model_folder
        config = load_config(folder, model.trust_remote_code)
        check_base(config, model.quantization)
        tokenizer = load_tokenizer(folder, model.trust_remote_code)
        return settle(tokenizer, config.get_text_config().vocab_size, model.chat_template)

    def check_foreign(self) -> None:
        """Raise ModelError where a model from elsewhere, if it is here, cannot score.

        Else that would be found as it scores, some hours in.
        """
        for name in dict.fromkeys(foreign_models(self.recipe)):
            if is_path(name) or sources.model_repo(name).cached():
                from rlhf_recipes.models.reward_model import check_foreign

                check_foreign(sources.model_folder(name, self.recipe), self.tokens)

    def check_adapters(self) -> None:
        """Raise ModelError where `lora` names layers that the base model does not have."""
        targets = (self.recipe.lora or {}).get("target_modules", "")
        if not isinstance(targets, str):
            from rlhf_recipes.models.base import check_targets
            from rlhf_recipes.models.load import without_weights

            trusted = self.recipe.model.trust_remote_code
            check_targets(without_weights(self.model_folder, trusted), targets)

    def foreign(self, name: str) -> Role:
        """The reward model that a folder or hub id names, beside the base model."""
        from rlhf_recipes.models.reward_model import open_foreign

        folder = sources.model_folder(name, self.recipe)
        return open_foreign(folder, self.base, self.tokens, self._prompts)

    def _prompts(self) -> dict[tuple[int, ...], Messages]:
        """The turns of every prompt that was encoded, the test side's among them, by its ids."""
        self.data(self.recipe.dataset)
        sides = ("train", "validation", "test")
        rows = [e for data in self._data.values() for side in sides for e in data.judged(side)]
        return {tuple(e.prompt_ids): e.turns for e in rows}

    def data(self, table: DatasetTable) -> Data:
        """The rows of a [dataset] table, encoded and split."""
        from rlhf_recipes.data.kept_rows import load_rows

        key = repr(table)
        if key not in self._data:
            whole = self.recipe.dataset
            tested = set() if table == whole else self.data(whole).tested
            columns = {c for name in self.recipe.all_stages for c in columns_of(self.recipe, name)}
            self._data[key] = load_rows(table, self.tokens, tested, sorted(columns), self.runs)
        return self._data[key]

    def data_of(self, stage: str) -> Data:
        """The rows that a stage reads: of its dataset, and the judgements that are there."""
        table, on = self.recipe.dataset_of(stage), self.of(stage)
        files = [file for file in self.judged.get(stage, ()) if file.is_file()]
        judged = [judged_table(self.recipe, table, file) for file in files]
        if reads_dataset(self.recipe, stage):
            judged = [table, *table.more, *judged]
        if not files or not judged:
            return on.data(table)
        return on.data(replace(judged[0], more=tuple(judged[1:])))

    def put_data(self, table: DatasetTable, data: Data) -> None:
        """Let these rows stand for those of a [dataset] table."""
        self._data[repr(table)] = data

    @cached_property
    def base(self) -> Base:
        return self.load_base(self.recipe.model.quantization)

    def release(self) -> None:
        """Let go of the base model: who needs it next reads it anew."""
        from rlhf_recipes.models.load import empty

        base = vars(self).pop("base", None)
        if base is not None and base.lm is not None:
            empty(base.lm)

    def exported(self, output: Path | None) -> PreTrainedModel:
        """The causal model of a stage's output (None: of nothing trained), merged, unquantized."""
        from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
        from safetensors.torch import load_file

        from rlhf_recipes.models.base import ADAPTER
        from rlhf_recipes.models.load import compute_dtype, load_causal_lm

        asked = self.recipe.model
        words = {"dtype": compute_dtype(asked.dtype), "trusted": asked.trust_remote_code}
        if self.recipe.lora is None or output is None:
            return load_causal_lm(self._whole(output), **words)
        lm = load_causal_lm(self.model_folder, **words)
        # The recipe says what the adapter is: a folder's own word may name files and modules.
        words = copy.deepcopy(self.recipe.lora)  # PEFT writes into it
        lm = get_peft_model(lm, LoraConfig(task_type="CAUSAL_LM", **words))
        set_peft_model_state_dict(lm, load_file(output / ADAPTER))
        return lm.merge_and_unload()

    def _whole(self, output: Path | None) -> Path:
        """A folder of whole weights: a stage's, which may have come from elsewhere, or the base."""
        if output is not None:
            trust.check_model(output, trusted=self.recipe.model.trust_remote_code)
        return output or self.model_folder

    def engine(
        self,
        folder: Path | None,
        tell: Callable[[str], object],
        save: Callable[[Path], object] | None = None,
    ) -> Vllm | None:
        """The server that samples under the adapter in `folder`, where the recipe has it so."""
        if self.recipe.model.sampler != VLLM:
            return None
        from rlhf_recipes.models.load import compute_dtype
        from rlhf_recipes.models.vllm import Vllm, command

        dtype, lora = compute_dtype(self.recipe.model.dtype), self.recipe.lora or {}
        start = command(self.model_folder, str(dtype).removeprefix("torch."), lora["r"])
        return Vllm(folder, tell, save, start)

    def load_base(self, quantization: str) -> Base:
        """The base model with room for adapters, beside the one that is kept, if it is."""
        import torch

        from rlhf_recipes.models.base import Base
        from rlhf_recipes.models.load import compute_dtype, load_causal_lm

        dtype = compute_dtype(self.recipe.model.dtype)
        whole = self.recipe.lora is None

        def load(source: Path | None) -> Any:
            lm = load_causal_lm(
                self._whole(source),
                # Weights that are trained whole are float32 under autocast: a step of 1e-6
                # vanishes in bfloat16's 8 bits.
                dtype=torch.float32 if whole else dtype,
                quantization=quantization,
                trusted=self.recipe.model.trust_remote_code,
            )
            lm.generation_config.eos_token_id = self.tokens.eos_id
            lm.generation_config.pad_token_id = self.tokens.pad_id
            return lm

        return Base(load, self.recipe.lora, dtype)


def judged_table(recipe: Recipe, table: DatasetTable, file: Path) -> DatasetTable:
    """The table of a file of judgements, with another one's limits; no sampled answer is over them.

    A text that was sampled may have a few tokens more once it is read again.
    """
    asked = max((most for name in recipe.stages if (most := recipe.most_tokens(name))), default=0)
    most = max(table.max_answer_tokens, 2 * asked)
    none = dict.fromkeys(["name", "data_dir", "data_files", "split", "revision", "max_rows"])
    none |= dict.fromkeys(["test_split", "weight", "columns"])
    return replace(
        table, path=str(file.resolve()), **none, max_answer_tokens=most, more=(), judged=True
    )


def check_models(recipe: Recipe) -> None:
    """Raise ModelError where the base model is here, and a run would stop for it.

    Its small files alone are read, unless they leave a doubt: another architecture than a causal
    model's, packed weights, tokens beyond the embedding, models from elsewhere, layers by name.
    """
    if not (recipe.model.is_local or sources.base_repo(recipe).cached()):
        return
    session = Session(recipe, {})
    config = trust.check_config(session.model_folder, trusted=recipe.model.trust_remote_code)
    trust.check_tokenizer(session.model_folder)
    made = config.get("architectures") or ["LMHeadModel"]
    plain = any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in made)
    library = find_spec("transformers")
    kinds = Path(library.origin if library and library.origin else ".").parent / "models"
    rows, last = config.get("vocab_size"), trust.last_added_token(session.model_folder)
    if (
        not plain
        or {"vision_config", "quantization_config"} & config.keys()
        or not (
            kinds / str(config.get("model_type"))
        ).is_dir()  # a kind that transformers may not know
        or last is None
        or (isinstance(rows, int) and last >= rows)
    ):
        tokens = session.tokens
        beyond = len(tokens.tokenizer) > tokens.rows
        if beyond and all(table.is_local for table in (recipe.dataset, *recipe.dataset.more)):
            session.data(recipe.dataset)
    session.check_foreign()
    session.check_adapters()
    judging = session.of(JUDGE)
    if judging is not session:
        check_models(replace(judging.recipe, evaluation=None))
