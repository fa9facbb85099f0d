"""Recipes that are wrong: a case for every message, with its line, its key and the word that helps.

The wording is free to change, but for the texts in tests/test_malformed.py.
"""

from __future__ import annotations

from collections.abc import Iterator

from tests.helpers.recipes import DATA, MIRROR, MODEL, SHA

STAGES = 'stages = ["sft", "reward", "ppo"]'
MIRRORED = MIRROR.replace("\n", "; ")
START = {STAGES: 1, MODEL: 4, DATA: 7}  # their lines in MINIMAL

# In place of a line of MINIMAL, or after it where a row begins with `+`; `;` begins another line.
# The problem is on the last line and about its key, unless the row says `line key:` before a word.
ROWS = {
    STAGES: """
    stages = ["sft", "grpo"] | nothing to score with
    stages = ["../x"] | cannot be the name of a stage
    stages = ["b"]; b = { kind = "dqo" } | 2 b.kind: one of sft, reward, ppo, dpo, kto
    stages = ["sft"]; sft = { kind = "ppo" } | 2 sft.kind: "sft", or left out
    stages = ["sft"]; reward2 = {} | did you mean "reward"?
    stages = ["SFT"] | did you mean "sft"?
    stages = ["rm"] | here that is reward
    stages = ["ppo", "reward"]; ppo = {} | put a "reward" stage before it
    + ppo.policy = "reward" | not sft or ppo or dpo
    + ppo.policy = "stf" | did you mean "sft"?
    + ppo.reference = "ppo" | does not come before
    + sft.reward_model = "reward" | one of [ppo]
    + sft.dataset.max_rows = 1 | 2 sft.dataset: needs path
    stages = ["sft", "label"] | nothing to judge
    stages = ["sample", "label"]; label.by = "rule" | 2 label.by: needs rule
    stages = ["sample", "label"]; label.rule = { rule = "ended" } | by = "rule"
    stages = ["sample", "label"]; label.by = "model" | 2 label.by: needs model
    stages = ["sample", "label"]; label.price = [1.0] | two numbers
    stages = ["sample", "label"]; label.by = "rule"; label.rule = "x" | a table with a rule
    stages = ["sample"]; sample.choose = "unsure" | needs a reward model
    stages = ["reward", "sample"]; sample = { answers = 1, choose = "unsure" } | 2 sample.choose: 2
    + reward.pairs = ["labels"] | neither
    + rounds.count = 2 | 2 rounds.from: must be one of stages
    + ppo.num_mini_batches = 2; ppo.whiten_rewards = true | at least 8 rows
    stages = ["rloo"]; rloo.reward_model = "a/b"; rloo.num_generations = 3 | does not divide
    stages = ["grpo"]; grpo.reward_model = "a/b"; grpo.generation_batch_size = 12 | not a multiple
    stages = ["grpo"]; grpo.reward_model = "a/b"; grpo.top_p = 0.9 | another distribution
    + evaluation.judge = {} | needs one of rule
    + evaluation.judge = { python = 5 } | 2 evaluation.judge.python: must be text
    + ppo.num_generations = 4 | a stage of kind rloo or grpo has it
    + lora.target_modules = ["q_proj", "model.embed_tokens"] | embed_tokens holds the vocabulary
    + lora.target_modules = "(" | no regular expression
    + lora.exclude_modules = "(a+)+" | in a list
    + lora.rank_pattern = { "(" = 4 } | 2 lora.rank_pattern.(: no regular expression
    + lora.alpha_pattern = { q_proj = "4" } | 2 lora.alpha_pattern.q_proj: at least 1
    + lora.layers_to_transform = [0] | a list of names
    + lora.target_modules = ["q_proj"]; lora.layers_pattern = ["layers"] | layers_to_transform
    + lora.init_lora_weights = "orthogonal"; lora.r = 3 | 3 lora.r: must be even
    + lora.lora_alpa = 1 | did you mean "lora_alpha"?
    + sft.max_length = 9 | dataset.max_prompt_tokens
    + sft.lora = { r = 3 } | before the first [table]
    + ppo.guard.max_lk = 1 | did you mean "max_kl"?
    + ppo.eval_strategy = "no" | keep = "last"
    + packing = true | FlashAttention
    + cutoff_len = 1 | dataset.max_prompt_tokens and dataset.max_answer_tokens
    + optimizer = {} | here that is optim
    + evaluation.judge = "python:./gone.py:rule" | no such file
    + evaluation.judge = "./adapter" | not a whole model
    + ppo.rewards = [] | is empty
    + ppo.rewards = ["a/b", "c/d"] | a second reward model
    + ppo.reward_model = "a/b"; ppo.rewards = ["reward"] | leave out reward_model
    + ppo.rewards = [{ weight = 2.0 }] | needs one of rule
    + ppo.rewards = [{ rule = "words" }] | needs at_least
    + ppo.rewards = [{ python = "x" }] | 2 ppo.rewards.python: "FILE.py:FUNCTION"
    + evaluation.judge = "oracle" | "python:FILE.py:FUNCTION"
    + evaluation.judge = ["a/b", "a/b"] | two that differ
    + evaluation.judge = "independent"; evaluation.judge_model = "./adapter" | not a whole model
    stages = ["sft", "dpo"]; evaluation.best_of = 16 | no stage makes one
    + title = "a\\nb" | one line
    + ppo.kl_coef = inf | finite
    + sft.lr_scheduler_type = "cosin" | did you mean "cosine"?
    + sft.run_name = "\\u0000" | code 0
    + sft.dataloader_prefetch_factor = 2 | dataloader_num_workers
    + ppo.lr_scheduler_type = "cosine_with_min_lr" | 2 ppo.lr_scheduler_kwargs: min_lr_rate
    + sft.lr_scheduler_type = "warmup_stable_decay" | 2 sft.lr_scheduler_kwargs: num_decay_steps
    + sft.gradient_checkpointing_kwargs = { use_reentrant = true } | use_reentrant = false
    + sft.optim_args = "a=1,b" | "name=value"
    + sft.optim = "grokadamw" | needs the package grokadamw
    + ppo.report_to = "dagshub" | needs the package dagshub
    + reward.report_to = ["tensorboard", "dvclive"] | needs the package dvclive
    + ppo.policy = "./adapter" | merge it into its base
    + lora.target_modules = "q_proj, v_proj" | ["q_proj", "v_proj"]
    + lora.target_modules = "all" | "all-linear"
    + lora.target_modules = ["all-linear"] | without brackets
    stages = ["sft", "dpo"]; dpo.loss_type = [] | names no loss
    stages = ["sft", "dpo"]; dpo.loss_weights = [1, 2] | one for each loss
    stages = ["sft", "dpo"]; dpo.loss_type = ["robust"]; dpo.label_smoothing = 0.5 | below 0.5
    stages = ["sft", "dpo"]; dpo.loss_type = ["exo_pair"] | 2 dpo.label_smoothing: above 0
    stages = ["dpo"]; dpo.loss_type = ["nca_pair"]; dpo.f_divergence_type = "forward_kl" | alone
    """,
    MODEL: f"""
    name = "./adapter" | not a whole model
    name = "../" | no config.json
    name = "./{"a" * 300}" | no such folder
    name = "a/\\u001b[2J" | neither a hub id nor a folder
    name = "./model"; revision = "main" | for models on the hub
    + revision = "../../x" | a branch, a tag or a commit
    + seed = 1 | before the first [table]
    + trust_remote_code = true | 40 hex digits
    {MIRRORED.replace('wheel = "a-wheel==1.0", ', "")} | needs wheel
    {MIRRORED.replace('file = "a/model.gguf", ', "")} | needs file
    {MIRRORED.replace("==1.0", ">=1.0")} | 5 model.mirror.wheel: "name==1.2"
    {MIRRORED.replace("a-wheel", "-r x")} | 5 model.mirror.wheel: "name==1.2"
    {MIRRORED.replace(".gguf", ".bin")} | 5 model.mirror.file: "package/model.gguf"
    {MIRRORED.replace(SHA, SHA.upper())} | 5 model.mirror.sha256: 64 hex digits
    {MIRRORED.replace(f'"{SHA}"', "5")} | 5 model.mirror.sha256: text
    {MIRRORED.replace("file =", "fiel = 1, file =")} | 5 model.mirror.fiel: did you mean "file"?
    {MIRRORED.replace("org/base", "./model")} | for models on the hub
    """,
    DATA: """
    path = "json" | "./….jsonl"
    path = "a b" | neither a hub id nor a file
    path = "./notes.txt" | .parquet
    path = "./model"; data_files = ["a.jsonl", "/b.jsonl"] | inside ./model
    path = "./model"; data_dir = "~/x" | inside ./model
    + data_files = "x" | leave it out
    + split = "train_prefs" | leave it out
    + validation_fraction = 0.9 | nothing is left to train on
    + columns = { reject = "bad" } | 8 dataset.columns.reject: did you mean "rejected"?
    """,
}


def cases() -> Iterator[tuple[str, str, str, str]]:
    """The text to replace in MINIMAL, its replacement, the problem's start and a word in it."""
    for old, rows in ROWS.items():
        for row in rows.strip().splitlines():
            text, said = row.strip().rsplit(" | ", 1)
            new = text.replace("+ ", f"{old}; ", 1) if text.startswith("+") else text
            new = new.replace("; ", "\n")
            last = new.splitlines()[-1]
            place, colon, word = said.rpartition(": ")
            line, key = START[old] + new.count("\n"), last.partition(" =")[0]
            if old in (MODEL, DATA):
                key = f"{'model' if old == MODEL else 'dataset'}.{key}"
            begins = place.replace(" ", ": ", 1) if colon else f"{line}: {key}"
            yield old, new, f"my.toml:{begins}: ", word


LAST = '\njudge_fraction = 0\n[evaluation]\njudge = "independent"'
CASES = [
    *cases(),
    (STAGES, "", "my.toml: stages: ", 'stages = ["sft", "reward", "ppo"]'),
    ("[model]\n" + MODEL, "", "my.toml: model: ", '[model] with name = "…"'),
    ("[model]\n" + MODEL, "model = 3", "my.toml:3: model: ", "a table"),
    (MODEL, "", "my.toml:3: model: ", "a hub id, or a folder"),
    (MODEL, f"{MODEL}\n# hf_{'a' * 20}", "my.toml:5: ", "HF_TOKEN"),
    (MODEL, MODEL + '\n"\\u001b[2J\\n" = 1', "my.toml:5: model. : ", "unknown key"),
    ("[dataset]\n" + DATA, "", "my.toml: dataset: ", '[dataset] with path = "…"'),
    (DATA, "", "my.toml:6: dataset: ", "a hub id, or a file or folder"),
    (DATA, f"{DATA}\n[dataset.columns]\nprompt = 3", "my.toml:9: dataset.columns.prompt: ", "text"),
    (DATA, DATA + LAST, "my.toml:10: evaluation.judge: ", "0.25 keeps a quarter"),
]

# What is not TOML: the line, and a word of what to do about it.
TOML = [
    (b"a = 1\nb = bfloat16\n", 2, "text needs quotes, true and false are small"),
    (b"a = 1979-02-30", 1, "text needs quotes"),
    (b"a = { x = 1 }\na.y = 1\n", 2, "stands there already"),
    (b"a = [1,\n", 1, "something is not closed"),
    (b"a = [1 2]\n", 1, "a comma is missing"),
    (b"a = { b = 1\n}", 1, "more than one line"),
    (b"a = { b = 1, b = 2 }\n", 1, "leave one of the two out"),
    (b"a: 1\n", 1, "key = value"),
    (b"a. = 1\n", 1, "letters, digits, - and _"),
    (b"[a\nb = 1\n", 1, "a table is written [table]"),
    (b"a = 1 000\n", 1, "one key a line"),
    (b'a = "b\nc = 1\n', 1, "the quotes do not close"),
    (b"a = 'b\nc = 1\n", 2, "something is not closed"),
    (b'a = "C:\\data"\n', 1, "write a backslash twice"),
    (b"a = 1\nb = '\xff'\n", 2, "is not UTF-8 text"),
    (b"# \x1b[2J\n", 1, "take it out, or close the quotes before it"),
    (b"a = 1\n" * 20_000, 20_000, "a recipe holds settings, no data"),
    (b"a = " + b"[" * 10_000, 1, "Nested more than 32 deep"),
    (b"a = 0x" + b"f" * 9_000, 1, "More than 200 characters in a row"),
]

# In COMMENTED: a word of --set or --unset, the key (with the word itself before it) and a word.
WORDS = [
    ("--set", "ppo.gamma=2", "ppo.gamma", "from 0 to 1"),
    ("--set", "model.nme=x", "model.nme", 'did you mean "name"?'),
    ("--set", "kl_coef=1", "kl_coef", "one of [ppo]"),
    ("--set", "pop.kl_coef=1", "pop.kl_coef", 'did you mean "ppo"?'),
    ("--set", "model.name.x=1", "model.name.x", 'is "./model" here, not a table'),
    ("--set", f"ppo{'.x' * 40}=1", "makes no TOML of the recipe", "change the file itself"),
    ("--set", 'lora={r = "8"}', "lora.r", "leave out the quotes"),
    ("--unset", "lora.rr", "lora.rr", 'did you mean "r"?'),
    ("--unset", "seed.x", "seed.x", "is not written in the recipe"),
]
