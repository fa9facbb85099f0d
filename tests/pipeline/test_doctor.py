"""What the doctor says of machines that lack something, each line with what to do."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path

import pytest
import torch

from rlhf_recipes import cli
from rlhf_recipes.findings import Finding
from rlhf_recipes.pipeline import doctor
from rlhf_recipes.sources import hub
from tests.helpers.fake_hub import FakeHub

pytestmark = pytest.mark.train


def ask(question: Callable[..., doctor.Answers], *words: Path) -> list[Finding]:
    return [*doctor.answered("", partial(question, *words))]


def fail(error: Exception, **_: object) -> None:
    raise error


def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str, cuda: str | None) -> None:
    """A machine with this driver, whose torch was built for `cuda` and finds no card."""
    file = tmp_path / "version"
    file.write_text(f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {version}  Tue Aug\nGCC: x\n")
    monkeypatch.setattr(doctor, "DRIVER", file)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_an_old_driver_that_puts_all_on_the_processor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    driver(monkeypatch, tmp_path, "535.54.03", "13.0")
    (line,) = ask(doctor.device)
    assert line.level == "fault"
    assert line.text == (
        "a card with driver 535.54.03, but torch computes on the processor: CUDA 13.0, which torch "
        "was built for, needs driver 580"
    )
    assert line.change == "update the driver, or install a torch for an older CUDA"
    assert str(line).splitlines()[1] == f"  → {line.change}"
    driver(monkeypatch, tmp_path, "535.54.03", "12.8")
    assert "CUDA does not start" in ask(doctor.device)[0].text
    driver(monkeypatch, tmp_path, "580.65", None)
    assert "was built without CUDA" in ask(doctor.device)[0].text
    driver(monkeypatch, tmp_path, "580.65", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES='' hides it" in ask(doctor.device)[0].text
    monkeypatch.setattr(doctor, "DRIVER", tmp_path / "none")
    monkeypatch.setenv("PATH", "")
    (line,) = ask(doctor.device)
    assert (line.level, line.text[:16]) == ("note", "no NVIDIA driver")


def test_a_card_that_torch_has_no_code_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"Card {i}")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90", "compute_90"])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: ((23 - 12 * i) * 10**9, 24 * 10**9))
    assert [f"{line.level} {line.text}" for line in ask(doctor.memory)][:2] == [
        "good 23 GB of card 0's 24 GB free: Card 0",
        "doubt 11 GB of card 1's 24 GB free: Card 1",
    ]
    for able, levels in {(6, 1): ["good", "fault"], (8, 6): ["good"]}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda able=able: able)
        found = ask(doctor.device)
        assert [line.level for line in found] == levels
        assert found[0].text.endswith("; the other 1 stay idle")


def test_a_real_step_in_four_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The very step: a layer whose product is off, or that gives no gradient, is found."""
    import bitsandbytes

    (line,) = ask(doctor.four_bit)
    assert line.level == "good", line
    forward = bitsandbytes.nn.Linear4bit.forward
    for broken in (
        lambda self, x: forward(self, x) * 3,
        lambda self, x: x * 0 + forward(self, x).detach(),
    ):
        monkeypatch.setattr(bitsandbytes.nn.Linear4bit, "forward", broken)
        (line,) = ask(doctor.four_bit)
        assert line.level == "fault" and "quantization" in line.change


def test_versions_that_were_not_tested(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "CONSTRAINTS", tmp_path / "constraints.txt")
    assert ask(doctor.versions)[0].level == "note"
    here = metadata.version("trl")
    (tmp_path / "constraints.txt").write_text(f"# a note\ntrl=={here}\nnot-here==1.0\n")
    (line,) = ask(doctor.versions)
    assert (line.level, line.text) == ("good", "as in constraints.txt, 1 of them")
    (tmp_path / "constraints.txt").write_text("trl==0.0.1\n")
    (line,) = ask(doctor.versions)
    assert (line.level, line.text) == ("doubt", f"trl {here}, tested with 0.0.1")


def test_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import close_session, constants

    assert "HF_HUB_OFFLINE" in ask(doctor.hub)[0].text
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(doctor, "TIMEOUT", 0.5)
    monkeypatch.setattr(hub, "TIMEOUT", 0.5)
    with FakeHub() as fake:
        monkeypatch.setattr(constants, "ENDPOINT", fake.url)
        assert ask(doctor.hub)[0].text.startswith(f"{fake.url} answers; no token")
        fake.troubles["/api/models"] = "error"
        assert "does not answer (HTTPStatusError)" in ask(doctor.hub)[0].text
        monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 30)
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
        told = {"unauthorized": "refuses the token", "busy": "not answer", "hang": "(ReadTimeout)"}
        for trouble, text in told.items():
            fake.troubles = {"whoami": trouble}
            assert text in ask(doctor.hub)[0].text
        fake.troubles[""] = "hang"
        (line,) = ask(doctor.hub)
        assert line.level == "doubt" and "does not answer (ReadTimeout)" in line.text
        close_session()
    (line,) = ask(doctor.hub)
    assert line.level == "doubt" and "does not answer (ConnectError)" in line.text
    close_session()


def test_the_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (line,) = ask(doctor.disk, tmp_path / "not" / "yet")
    assert line.level == "good"
    tmp_path.chmod(0o777)
    assert [line.level for line in ask(doctor.disk, tmp_path)] == ["good", "doubt"]
    monkeypatch.setattr(doctor, "LEAST_DISK", 2**60)
    assert "`rlhf-recipes clean` removes" in ask(doctor.disk, tmp_path)[0].change
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "runs"):
        (line,) = ask(doctor.disk, folder)
        assert (line.level, line.text) == (
            "fault",
            f"{tmp_path / 'file'} cannot be written to (Not a directory)",
        )
    for code in (errno.EROFS, errno.ENOSPC):
        failing = partial(fail, OSError(code, os.strerror(code)))
        monkeypatch.setattr(doctor.tempfile, "TemporaryFile", failing)
        (line,) = ask(doctor.disk, tmp_path / "runs")
        assert line.level == "fault" and f"({os.strerror(code)})" in line.text


def test_a_question_that_fails_is_a_line_and_the_command_tells_by_its_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def four_bit() -> None:
        raise ImportError("libbitsandbytes.so is broken\nand more")

    monkeypatch.setattr(doctor, "four_bit", four_bit)
    monkeypatch.setattr(sys, "argv", ["rlhf-recipes", "doctor", "--runs", str(tmp_path), "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    found = json.loads(capsys.readouterr().out)["lines"]
    assert ended.value.code == 1
    (fault,) = [line for line in found if line["level"] == "fault"]
    assert (fault["about"], fault["text"]) == (
        "4 bit",
        "ImportError: libbitsandbytes.so is broken",
    )
    abouts = [line["about"] for line in found]
    assert abouts[:3] == ["device", "precision", "memory"] and abouts[-3:] == [
        "hub",
        "disk",
        "runs",
    ]


def test_the_three_lines_before_a_run(tmp_path: Path) -> None:
    assert [line.about for line in doctor.short(tmp_path)] == ["device", "memory", "disk"]
