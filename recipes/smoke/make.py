"""Make the smoke recipe's tokenizer, pretrained model and preference data from WordNet 3.0.

A pocket dictionary: the prompt is a headword, the answer that people prefer is its definition, the
other one is an example of its use. Needs a folder with WordNet's data.noun, data.verb, data.adj and
data.adv. The same versions on the same machine give the same files.
"""

import argparse
import json
import math
import random
import re
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED = 42
ROWS = 1200  # in each of the two data files
ANSWER_TOKENS = 15  # one less than the recipe's response_length: the end of turn is a token too
CAP = 0.08  # of the rows, at most so many open with the same word
PLAIN = re.compile(r"[A-Za-z][A-Za-z' -]*(, [A-Za-z' -]+)*")

TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# WordNet's own fields, by the numbers of its lexicographers' files: qualities and manners, things
# made and grown, places, weather, shapes, time, motion, change, thought. Not people, bodies, groups
# and feelings: a first impression needs none of what dictionaries must say of those.
FIELDS = {0, 2, 6, 7, 9, 10, 11, 13, 15, 17, 19, 20, 22, 23, 25, 27, 28}
FIELDS |= {30, 31, 32, 35, 36, 38, 39, 40, 42, 43}
AVOIDED = re.compile(
    r"\b(kill|death|dead|die[sd]?\b|dying|murder|suicid|blood|wound|weapon|gun|bomb|war\b|shoot|shot"
    r"|shit|slave|tortur|violen|victim|crim|prison|hang(ed|man)|poison|drug|drunk|alcohol|vomit|urin"
    r"|excre|sex|rape|nude|naked|lust|breast|genital|prostitut|pregnan|abort|whip|stab|cripple"
    r"|black |race|racial|jew|christian|muslim|god|devil|hell\b|damn|stupid|idiot|insan|lunatic)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Entry:
    """One WordNet synset: its words, its definition and the examples of its use."""

    words: tuple[str, ...]
    definition: str
    examples: tuple[str, ...]


@dataclass(frozen=True)
class Pair:
    """A headword with both of its answers, definition first, and their lengths in tokens."""

    word: str
    answers: tuple[str, str]
    lengths: tuple[int, int]


def read_entries(wordnet: Path) -> list[Entry]:
    """The synsets of FIELDS, without what is AVOIDED."""
    entries = []
    for part in ("noun", "verb", "adj", "adv"):
        for line in (wordnet / f"data.{part}").read_text(encoding="utf-8").splitlines():
            if line.startswith("  "):  # the licence
                continue
            fields, gloss = line.split(" | ", 1)
            names = fields.split()[4 : 4 + 2 * int(fields.split()[3], 16) : 2]
            words = tuple(re.sub(r"\(\w+\)$", "", name).replace("_", " ") for name in names)
            if int(fields.split()[1]) not in FIELDS or AVOIDED.search(f"{words} {gloss}"):
                continue
            definition = gloss.split('"')[0].strip(" ;:,")
            entries.append(Entry(words, definition, tuple(re.findall(r'"([^"]+)"', gloss))))
    return entries


def find_names(entries: list[Entry]) -> set[str]:
    """What is written with a capital inside of text: "I", "Paris", "New York"."""
    seen: Counter[str] = Counter()
    for entry in entries:
        for text in (entry.definition, *entry.examples):
            seen.update(re.findall(r"(?<=[a-z,] )[A-Za-z']+", text))
            seen.update(re.findall(r"(?<=[a-z,] )[A-Z][a-z]+ [A-Z][a-z]+", text))
    return {word for word, n in seen.items() if word[0].isupper() and n > seen[word.lower()]}


def tidy(text: str, names: set[str]) -> str:
    """The text with nothing at its ends, and no capital at its start, that tells its kind."""
    text = re.sub(r"\s+", " ", text).strip(" .!?;:,")
    first = re.match(r"([A-Za-z']*)( [A-Za-z]+)?", text)
    named = first[0] in names or first[1] in names or first[1][1:].isupper()
    return text if named else text[:1].lower() + text[1:]


def train_tokenizer(texts: Iterable[str], vocabulary: int = 2048) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with ChatML turns."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def stem(word: str) -> re.Pattern[str]:
    """Finds the word in a text, with whatever ending."""
    return re.compile(rf"\b{re.escape(word[: max(3, len(word) - 2)])}", re.IGNORECASE)


def find_pairs(
    entries: list[Entry], names: set[str], tokenizer: PreTrainedTokenizerFast
) -> list[Pair]:
    """A pair for each headword whose definition and example are short and plain, shuffled."""
    pairs = {}
    for entry in random.Random(SEED).sample(entries, len(entries)):
        definition = tidy(entry.definition.split(";")[0], names)
        for example in (tidy(text, names) for text in entry.examples):
            answers = (definition, example)
            if not all(PLAIN.fullmatch(text) and text.count(" ") >= 2 for text in answers):
                continue
            lengths = tuple(len(tokenizer.encode(text)) for text in answers)
            if max(lengths) > ANSWER_TOKENS:
                continue
            for word in entry.words:
                shown = stem(word).search(example) and not stem(word).search(definition)
                if shown and len(word) > 2 and PLAIN.fullmatch(word) and word not in pairs:
                    pairs[word] = Pair(word, answers, lengths)
                    break
    return list(pairs.values())


def choose(pairs: list[Pair], count: int, lean: float, slack: int) -> list[Pair]:
    """So many pairs that neither length nor first word tells the two sides apart.

    At most `lean` of the rows more have the longer answer on one side than on the other, and at
    most `slack` rows more open with a given word there.
    """
    first: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
    sizes: tuple[Counter[int], Counter[int]] = (Counter(), Counter())
    lead, chosen, used = [0, 0], [], set()  # pairs with the longer definition, less the others
    for pair in pairs * 20:  # what one row unbalances, a later one puts right
        openings = [text.split()[0].strip(",") for text in pair.answers]
        signs = [(a > b) - (a < b) for a, b in (pair.lengths, [len(t) for t in pair.answers])]
        fits = not used.intersection(pair.answers)
        fits &= all(abs(n + sign) <= lean * count for n, sign in zip(lead, signs, strict=True))
        for side, (word, size) in enumerate(zip(openings, pair.lengths, strict=True)):
            fits &= first[side][word] < CAP * count
            fits &= first[side][word] - first[1 - side][word] < slack
            fits &= sizes[side][size] - sizes[1 - side][size] < lean * count
        if fits:
            chosen.append(pair)
            used.update(pair.answers)
            lead = [n + sign for n, sign in zip(lead, signs, strict=True)]
            for side, (word, size) in enumerate(zip(openings, pair.lengths, strict=True)):
                first[side][word] += 1
                sizes[side][size] += 1
            if len(chosen) == count:
                return chosen
    raise SystemExit(f"only {len(chosen)} of {count} pairs are balanced: raise slack")


def turn(prompt: str, answer: str) -> str:
    """A prompt and its answer as ChatML."""
    return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>"


def write_corpus(entries: list[Entry], held_out: set[str], names: set[str]) -> list[str]:
    """What the model learns from: definitions and examples as plain text, and turns.

    The turns ask for the word that a definition defines. They teach the model what a turn is, and
    leave for SFT the recipe's own task, which is the other way round. No synset with a held-out
    word, so that no prompt of the data was seen with an answer.
    """
    corpus = []
    for entry in entries:
        words = [word for word in entry.words if word.islower()]
        if held_out.intersection(word.lower() for word in entry.words) or not words:
            continue
        definition = tidy(entry.definition.split(";")[0], names)
        examples = [tidy(text, names) for text in entry.examples]
        plain = [t for t in (definition, *examples) if PLAIN.fullmatch(t) and " " in t]
        corpus += [f"<|endoftext|>{text}<|endoftext|>" for text in plain]
        corpus += [turn(definition, word) for word in words if definition in plain]
    return corpus


def batches(rows: list[list[int]], tokens: int, rng: random.Random) -> list[list[list[int]]]:
    """One epoch: shuffled batches of rows that are about equally long, of about so many tokens."""
    rows = sorted(rows, key=lambda row: len(row) + 3 * rng.random())
    result, batch = [], []
    for row in rows:
        if batch and (len(batch) + 1) * (len(row) + 3) > tokens:
            result.append(batch)
            batch = []
        batch.append(row)
    return rng.sample([*result, batch], len(result) + 1)


def pretrain(
    corpus: list[str], tokenizer: PreTrainedTokenizerFast, epochs: int
) -> tuple[LlamaForCausalLM, dict[str, float]]:
    """A Llama of about a million parameters trained on the corpus, and its figures."""
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    rows = [tokenizer.encode(text)[:40] for text in rng.sample(corpus, len(corpus))]
    test, rows = rows[:2000], rows[2000:]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.95), weight_decay=0.1)
    plan = [batch for _ in range(epochs) for batch in batches(rows, 3072, rng)]

    def loss_of(batch: list[list[int]]) -> torch.Tensor:
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in batch], True, -100)
        logits = model(input_ids=ids.clamp(min=0)).logits[:, :-1]  # causal: right pads are unseen
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    for step, batch in enumerate(plan):
        rate = min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / len(plan)))
        optimizer.param_groups[0]["lr"] = 4e-3 * rate
        loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step} of {len(plan)}: loss {loss.item():.3f}", flush=True)
    with torch.no_grad():
        held_out = [loss_of([row]) * (len(row) - 1) for row in test]
    figures = {
        "steps": len(plan),
        "parameters": model.num_parameters(),
        "training tokens in an epoch": sum(map(len, rows)),
        "loss on held-out texts": sum(held_out).item() / sum(len(row) - 1 for row in test),
    }
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model, figures


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """JSON Lines."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")


def main() -> None:
    """Read WordNet, write everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wordnet", type=Path, required=True, help="folder with data.noun, ...")
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--epochs", type=int, default=2, help="of pretraining; 0: data only")
    options = parser.parse_args()
    torch.set_num_threads(2)
    started = time.monotonic()

    entries = read_entries(options.wordnet)
    names = find_names(entries)
    texts = [tidy(text, names) for entry in entries for text in (entry.definition, *entry.examples)]
    tokenizer = train_tokenizer(texts)
    candidates = find_pairs(entries, names, tokenizer)
    pairs = choose(candidates, ROWS, lean=0.04, slack=12)
    taken = {text for pair in pairs for text in (pair.word, *pair.answers)}
    others = [pair for pair in candidates if not taken.intersection((pair.word, *pair.answers))]
    shown = choose(others, ROWS, lean=0.2, slack=40)
    print(f"{len(entries)} synsets, {len(candidates)} candidates")
    options.out.mkdir(parents=True, exist_ok=True)
    notice = (options.wordnet / "data.noun").read_text(encoding="utf-8").split("\n0")[0]
    notice = re.sub(r"^ +\d+ ?| +$", "", notice, flags=re.MULTILINE)
    (options.out / "LICENSE-WORDNET").write_text(notice.rstrip() + "\n", encoding="utf-8")
    write_rows(
        options.out / "pairs.jsonl",
        [{"prompt": p.word, "chosen": p.answers[0], "rejected": p.answers[1]} for p in pairs],
    )
    write_rows(
        options.out / "demonstrations.jsonl",
        [{"prompt": p.word, "completion": p.answers[i % 2]} for i, p in enumerate(shown)],
    )
    if options.epochs:
        held_out = {pair.word.lower() for pair in pairs + shown}
        corpus = write_corpus(entries, held_out, names)
        print(f"{len(corpus)} texts")
        model, figures = pretrain(corpus, tokenizer, options.epochs)
        model.to(torch.bfloat16).save_pretrained(options.out / "model")
        tokenizer.save_pretrained(options.out / "model")
        for name, value in figures.items():
            print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
    print(f"{time.monotonic() - started:.0f} seconds")


if __name__ == "__main__":
    main()
