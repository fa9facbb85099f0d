"""A folder that must stay away: every hostile payload of the security tests would make it."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path


class Canary:
    """`pickled` and `code` make it where they are loaded or run."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.code = f"import os; os.mkdir({str(file)!r})\n"
        self.pickled = pickle.dumps(self)

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.file),)

    def torch(self) -> bytes:
        import torch

        buffer = io.BytesIO()
        torch.save({"weight": self}, buffer)
        return buffer.getvalue()

    @property
    def touched(self) -> bool:
        return self.file.exists()
