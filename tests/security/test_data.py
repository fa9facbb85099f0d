"""Rows, templates and checkpoints from strangers: none runs, climbs, runs on or speaks up."""

from __future__ import annotations

import hashlib
import io
import json
import resource
import shutil
import signal
import sys
import tarfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from rlhf_recipes import cli, screen
from rlhf_recipes.data import tokens
from rlhf_recipes.errors import DataError, ModelError, RecipeError, RlhfRecipesError
from rlhf_recipes.pipeline.runner import run
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.stages.session import Session
from rlhf_recipes.store import locks
from tests.helpers.canary import Canary
from tests.helpers.killed import Killed, build
from tests.helpers.tiny import RECIPE
from tests.helpers.worlds import HEAD

pytestmark = pytest.mark.train

ROW = '{"prompt": "red", "chosen": "blue", "rejected": "cat"}\n'
SECRET = ROW.replace("red", "white")


def front(configs: str) -> str:
    return f"---\nconfigs: {configs}\n---\n"


def tar(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def rows(model: Path, data: Path, *words: str) -> list[str]:
    """The prompts that a recipe on this data would learn from."""
    file = data.parent / "recipe.toml"
    file.write_text(RECIPE.format(model=model, data=data))
    data = Session(load_recipe(file, set=words), {}).data(load_recipe(file, set=words).dataset)
    return [example.prompt for example in (*data.train, *data.validation, *data.test)]


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


# ---- rows ---------------------------------------------------------------------------------------

BOMB = "---\na: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{now}: &{now} [{','.join(['*' + before] * 9)}]\n"
    for before, now in zip("abcdefgh", "bcdefghi", strict=True)
)
HOSTILE = {
    "a script": ({"data.py": "{code}", "a.jsonl": ROW}, "scripts are no longer supported"),
    "only a script": ({"data.py": "{code}"}, "scripts are no longer supported"),
    "a pickle": ({"train.pkl": "{pickle}"}, "cannot be read: No .supported. data files"),
    "a pickle in a tar": ({"train.tar": "{tar:a.pickle}"}, "the rows in .* are webdataset"),
    "a torch file in a tar": ({"train.tar": "{tar:a.pth}"}, "the rows in .* are webdataset"),
    "code in YAML": (
        {"README.md": front("!!python/object/apply:os.mkdir ['{canary}']"), "a.jsonl": ROW},
        "cannot be read: could not determine a constructor",
    ),
    "a file above": (
        {"README.md": front("[{{data_files: ../secret.jsonl}}]"), "a.jsonl": ROW},
        r"README\.md names '\.\./secret\.jsonl' as rows",
    ),
    "a file of the root": (
        {"README.md": front("[{{data_files: {secret}}}]"), "a.jsonl": ROW},
        "README.md names '/.*secret.jsonl' as rows",
    ),
    "a file above, hidden": (
        {".huggingface.yaml": "configs: [{{data_files: ../secret.jsonl}}]", "a.jsonl": ROW},
        "huggingface.yaml names",
    ),
    "a folder above": (
        {"README.md": front("[{{data_dir: ..}}]"), "a.jsonl": ROW},
        r"README\.md names '\.\.' as rows",
    ),
    "a sibling of the same start": (
        {"README.md": front("[{{data_files: ../data-evil/a.jsonl}}]"), "a.jsonl": ROW},
        "README.md names",
    ),
    "an address": (
        {"README.md": front('[{{data_files: "{url}/a.jsonl"}}]'), "a.jsonl": ROW},
        "README.md names 'http",
    ),
    "an address in a chain": (
        {"README.md": front('[{{data_files: "zip://*.jsonl::{url}/a.zip"}}]'), "a.jsonl": ROW},
        "README.md names",
    ),
    "an address, far down": (
        {"README.md": "\n" * 150 + front('[{{data_files: "{url}/a.jsonl"}}]'), "a.jsonl": ROW},
        "README.md names 'http",
    ),
    "an address, after what looks like the end": (
        {"README.md": "---\n---b: 1" + front('[{{data_files: "{url}/a"}}]')[3:], "a.jsonl": ROW},
        "README.md names 'http",
    ),
    "a bomb": ({"README.md": BOMB + "configs: *i\n---\n", "a.jsonl": ROW}, "names no end of files"),
}


@pytest.fixture
def visited() -> list[str]:
    """What was asked of a server on loopback, whose address is the first."""
    asked: list[str] = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

    server = HTTPServer(("127.0.0.1", 0), Answer)
    asked.append(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
    yield asked
    server.shutdown()
    server.server_close()
    assert len(asked) == 1


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_datasets(
    tiny_model: Path, tmp_path: Path, canary: Canary, visited: list[str], case: str
) -> None:
    files, line = HOSTILE[case]
    words = {"canary": canary.file, "secret": tmp_path / "secret.jsonl", "url": visited[0]}
    payloads = {
        "{code}": canary.code,
        "{pickle}": canary.pickled,
        "{tar:a.pickle}": tar("a.pickle", canary.pickled),
        "{tar:a.pth}": tar("a.pth", canary.torch()),
    }
    write(tmp_path, {"secret.jsonl": SECRET, "data-evil/a.jsonl": SECRET})
    for name, content in files.items():
        if content not in payloads and content != ROW and case != "a bomb":
            content = content.format(**words)
        write(tmp_path / "data", {name: payloads.get(content, content)})
    with pytest.raises(DataError, match=line) as caught:
        rows(tiny_model, tmp_path / "data")
    assert "\n" not in str(caught.value)


def picture(file: Path, place: str, name: str = "image") -> Path:
    """Rows in Parquet, one column of which is a picture that lies elsewhere."""
    import pyarrow
    from pyarrow import parquet

    texts = {"dtype": "string", "_type": "Value"}
    features = dict.fromkeys(json.loads(ROW), texts) | {name: {"_type": "Image"}}
    one = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    columns = {column: [text] for column, text in json.loads(ROW).items()}
    columns[name] = pyarrow.array([{"bytes": None, "path": place}], one)
    table = pyarrow.table(columns)
    table = table.replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    file.parent.mkdir(exist_ok=True)
    parquet.write_table(table, file)
    return file


def test_a_picture_that_lies_elsewhere_is_not_opened(
    tiny_model: Path, tmp_path: Path, visited: list[str]
) -> None:
    file = picture(tmp_path / "data" / "a.parquet", f"{visited[0]}/x.png")
    assert rows(tiny_model, file) == rows(tiny_model, file.parent) == ["red"]
    picture(file, "/etc/passwd", "prompt")
    with pytest.raises(DataError, match="1 of 1 rows are unusable"):
        rows(tiny_model, file)


@pytest.mark.parametrize("name", ["a.zip", "a.jsonl", "a.csv"])
def test_an_archive_is_not_unpacked(tiny_model: Path, tmp_path: Path, name: str) -> None:
    file = write(tmp_path / "data", {"b.jsonl": ROW}) / name
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("c.jsonl", ROW)
    words = [f'dataset.data_files="{name}"']
    with pytest.raises(DataError, match="is an archive"):
        rows(tiny_model, file.parent, *words)
    if file.suffix != ".zip":
        with pytest.raises(DataError, match="is an archive"):
            rows(tiny_model, file)


def test_a_file_is_read_that_is_named_like_a_pattern(tiny_model: Path, tmp_path: Path) -> None:
    write(tmp_path, {"a[1].jsonl": ROW, "a1.jsonl": SECRET})
    assert rows(tiny_model, tmp_path / "a[1].jsonl") == ["red"]


@pytest.mark.parametrize("what", ["a.jsonl", "folder"])
def test_links_do_not_lead_out_of_a_dataset(tiny_model: Path, tmp_path: Path, what: str) -> None:
    write(tmp_path, {"secret/a.jsonl": SECRET, "data/b.jsonl": ROW})
    (tmp_path / "data" / what).symlink_to(tmp_path / "secret" / what.replace("folder", ""))
    words = ['dataset.data_files="folder/a.jsonl"'] if what == "folder" else []
    with pytest.raises(DataError, match="as rows, which is not inside"):
        rows(tiny_model, tmp_path / "data", *words)
    (tmp_path / "data" / what).unlink()
    (tmp_path / "data" / "c.jsonl").symlink_to("b.jsonl")
    assert rows(tiny_model, tmp_path / "data") == ["red", "red"]


@pytest.mark.parametrize(
    "word",
    [
        *(
            'data_dir=".."',
            'data_dir="./.."',
            'data_dir="/etc"',
            'data_dir="~"',
            'data_dir="a/../.."',
        ),
        *('data_files="../a.jsonl"', 'data_files=["a.jsonl", ".."]', 'data_files="~/a.jsonl"'),
        *('data_files={ train = "https://x/a.jsonl" }', 'data_files="zip://*::../a.zip"'),
    ],
)
def test_a_recipe_names_no_rows_outside_its_dataset(tiny_recipe: Path, word: str) -> None:
    (tiny_recipe.parent / "data").mkdir()
    path = f"dataset.path={tiny_recipe.parent / 'data'}"
    with pytest.raises(RecipeError, match="must name what is inside"):
        load_recipe(tiny_recipe, set=[path, f"dataset.{word}"])


# ---- templates ----------------------------------------------------------------------------------

GLOBALS = "__init__.__globals__"
TEMPLATES = {
    "os by cycler": (f"{{{{ cycler.{GLOBALS}.os.mkdir('CANARY') }}}}", "fails: access to"),
    "os by lipsum": (f"{{{{ lipsum.{GLOBALS}['os'].mkdir('CANARY') }}}}", "fails: access to"),
    "subclasses": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "fails: access to attribute"),
    "attr": ("{{ (''|attr('__class__'))() }}", "fails: "),
    "format": ("{{ '{0.__class__.__init__.__globals__}'.format(cycler) }}", "fails: access to"),
    "a list that is changed": ("{% set _ = messages.append(1) %}", "fails: access to attribute"),
    "an import": ("{% import '/etc/passwd' as x %}", "fails: "),
    "a loop": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
               "does not end"),
    "a power": ("{{ (9 ** (9 ** 9)) > messages|length }}", "does not end"),
    "a text": ("{{ ('a' * (messages|length * 10 ** 12))|length }}", "takes all memory"),
    "a recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails: RecursionError"),
    "no template": ("{% for", "fails: "),
    "a division": ("{{ 1 // 0 }}", "fails: ZeroDivisionError"),
}  # fmt: skip


@pytest.mark.parametrize("case", TEMPLATES)
def test_hostile_templates(
    tiny_model: Path, tiny_pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str,
    canary: Canary,
) -> None:  # fmt: skip
    monkeypatch.setattr(tokens, "TEMPLATE_SECONDS", 0.5)
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    text, line = TEMPLATES[case]
    (model / "chat_template.jinja").write_text(text.replace("CANARY", str(canary.file)))
    started = time.monotonic()
    with pytest.raises(ModelError, match=f"^the model's chat template {line}") as caught:
        rows(model, tiny_pairs)
    assert time.monotonic() - started < 30
    assert "\n" not in str(caught.value)
    (tmp_path / "plain.toml").write_text(RECIPE.format(model=model, data=tiny_pairs))
    words = ['model.chat_template="plain"', "model.quantization=none"]
    assert Session(load_recipe(tmp_path / "plain.toml", set=words), {}).tokens.eos_id == 2


@pytest.mark.parametrize("name", ["../../evil", "/tmp/evil"])
def test_a_template_whose_name_climbs(
    tiny_model: Path, tiny_pairs: Path, tmp_path: Path, name: str
) -> None:
    """Refused before a stage, not where the finished model is written."""
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    config = json.loads((model / "tokenizer_config.json").read_text())
    text = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").unlink()
    named = [{"name": "default", "template": text}, {"name": name, "template": "x"}]
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": named}))
    with pytest.raises(ModelError, match="names that no file of its folder can have"):
        rows(model, tiny_pairs)


def test_a_template_is_tried_once_and_its_rows_are_rendered_without_limits(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An alarm or a memory limit for each row would cost time, and is unsafe beside threads."""
    tried, bounded = [], tokens._bounded
    monkeypatch.setattr(tokens, "_bounded", lambda: tried.append(1) or bounded())
    before = signal.getsignal(signal.SIGALRM), resource.getrlimit(resource.RLIMIT_AS)
    write(tmp_path, {"a.jsonl": ROW * 4})
    assert rows(tiny_model, tmp_path / "a.jsonl") == ["red"] * 4 and tried == [1]
    assert (signal.getsignal(signal.SIGALRM), resource.getrlimit(resource.RLIMIT_AS)) == before


def test_what_a_template_says_commands_no_terminal(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (model / "chat_template.jinja").write_text("{{ raise_exception('\x1b[2J\u202eevil\x07') }}")
    write(
        tmp_path, {"a.jsonl": ROW, "x.toml": RECIPE.format(model=model, data=tmp_path / "a.jsonl")}
    )
    monkeypatch.setattr(sys, "argv", ["rlhf-recipes", "run", str(tmp_path / "x.toml")])
    monkeypatch.setenv("RLHF_RECIPES_RUNS", str(tmp_path / "runs"))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    told = capsys.readouterr().err
    assert ended.value.code == 1 and "chat template fails: [2Jevil" in told
    assert not set("\x1b\u202e\x07") & set(told)


# ---- checkpoints --------------------------------------------------------------------------------


PICKLES = {"optimizer.pt", "scheduler.pt", "rng_state.pth"}


@pytest.fixture(scope="module")
def cut(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training that was killed after its checkpoint."""
    folder = tmp_path_factory.mktemp("cut") / "work"
    with pytest.raises(Killed):
        build(tiny_model, folder, killed_after=2).train()
    return folder


@pytest.mark.parametrize("name", sorted(PICKLES))
def test_a_pickle_in_a_checkpoint(
    tiny_model: Path, cut: Path, tmp_path: Path, canary: Canary, name: str
) -> None:
    """Without its digest it is set aside; with one it is opened as tensors alone, and is none."""
    work = Path(shutil.copytree(cut, tmp_path / "work"))
    (folder,) = work.glob("checkpoint-*")
    assert {file.name for file in folder.iterdir() if file.suffix.startswith(".p")} == PICKLES
    (folder / name).write_bytes(canary.torch())
    shutil.copytree(work, tmp_path / "forged")
    assert build(tiny_model, work).newest() is None
    assert [path.name for path in work.iterdir()] == ["damaged-000002"]

    folder = tmp_path / "forged" / folder.name
    record = json.loads((folder / "checkpoint.json").read_text())
    record["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "checkpoint.json").write_text(json.dumps(record))
    with pytest.raises(Exception, match="(?i)weights.only"):
        build(tiny_model, tmp_path / "forged").train()
    assert not canary.touched


# ---- a run from elsewhere -----------------------------------------------------------------------


@pytest.mark.parametrize("place", ["../../evil", "..", "/evil", ".stages/../../evil", "{evil}"])
def test_a_manifest_leads_to_no_folder_but_its_stages(tmp_path: Path, place: str) -> None:
    from rlhf_recipes.pipeline import export
    from rlhf_recipes.report import facts
    from rlhf_recipes.store import history

    evil = write(tmp_path / "evil", {"stage.json": '{"format": 1, "key": "k"}'})
    entry = {"name": "sft", "kind": "sft", "outcome": "ran", "key": "k"}
    entry["folder"] = place.format(evil=evil)
    manifest = HEAD | {"stages": [entry], "model": {}}
    run_folder = write(tmp_path / "runs" / "one", {"manifest.json": json.dumps(manifest)})
    stages = (tmp_path / "runs" / ".stages").resolve()
    found = [
        export.finished_stage(run_folder, None)[2].parent,
        facts.Facts(run_folder).stages[0].folder,
        *history.stage_folders(tmp_path / "runs", manifest),
    ]
    assert {folder.resolve().parent for folder in found} == {stages}


@pytest.mark.parametrize("name", ["tiny/log.txt", ".tiny.lock", ".stages/.sft-0123456789ab.lock"])
def test_a_link_in_a_runs_folder_leads_no_writing_out(tmp_path: Path, name: str) -> None:
    """The log is added to, and a lock's file is emptied."""
    write(tmp_path, {"precious": "mine", "runs/tiny/a": "", "runs/.stages/a": ""})
    file = tmp_path / "runs" / name
    file.symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic link"):
        if name.endswith(".lock"):
            with locks.lock(file.with_name(file.name[1:-5]), "it"):
                pass
        else:
            screen.Screen(file)
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize("name", ["../x", "..", "/x", "a/b", ".x", "", "a\nb", "a\x1b[2J"])
def test_a_run_has_no_name_that_climbs(tiny_recipe: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(RlhfRecipesError, match="is no name for a run"):
        run(load_recipe(tiny_recipe), runs=tmp_path / "runs", name=name)
    assert not (tmp_path / "runs").exists()
