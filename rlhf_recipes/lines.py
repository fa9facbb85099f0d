"""The line of each key in a TOML text.

No TOML library for Python tells where a key stands (tomllib and tomlkit keep it to themselves).
The text has been parsed before, so this takes it to be valid and only follows its structure.
"""

import re

from rlhf_recipes.fields import parse_value

KeyPath = tuple[str | int, ...]

TOKEN = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}|\'\'\'.*?\'{3,5}'  # may end in up to two quotes of its own
    r'|"(?:\\.|[^"\\])*"|\'[^\']*\'|\#[^\n]*|[A-Za-z0-9_-]+|\n|[ \t\r]+|.',
    re.DOTALL,
)


def key_lines(text: str) -> dict[KeyPath, int]:
    """From a key's path, with an index for each place in an array, to its line, counted from 1.

    A table stands where it is first named or implied; so does an array of tables.
    """
    return _Scan(text).lines


class _Scan:
    def __init__(self, text: str) -> None:
        self.lines: dict[KeyPath, int] = {}
        self.tokens: list[tuple[str, int]] = []
        line = 1
        for token in TOKEN.findall(text):
            if token[0] not in "# \t\r":
                self.tokens.append((token, line))
            line += token.count("\n")
        self.tokens.append(("\n", line))
        self.at = 0
        table: KeyPath = ()
        while self.at < len(self.tokens):
            if self.skip("\n"):
                continue
            if self.skip("["):
                self.skip("[")
                table = self.key(())
                self.skip("]")
                self.skip("]")
            else:
                self.pair(table)

    @property
    def token(self) -> str:
        return self.tokens[self.at][0]

    def skip(self, token: str) -> bool:
        found = self.token == token
        self.at += found
        return found

    def key(self, path: KeyPath) -> KeyPath:
        """A key, dotted or not, below `path`."""
        while True:
            token, line = self.tokens[self.at]
            path = (*path, parse_value(token) if token[0] in "\"'" else token)
            self.lines.setdefault(path, line)
            self.at += 1
            if not self.skip("."):
                return path

    def pair(self, table: KeyPath) -> None:
        path = self.key(table)
        self.skip("=")
        self.value(path)

    def value(self, path: KeyPath) -> None:
        if self.skip("{"):
            while not self.skip("}"):
                if not (self.skip(",") or self.skip("\n")):
                    self.pair(path)
        elif self.skip("["):
            place = 0
            while not self.skip("]"):
                if self.skip(","):
                    place += 1
                elif not self.skip("\n"):
                    self.lines[(*path, place)] = self.tokens[self.at][1]
                    self.value((*path, place))
        else:
            while self.token not in ("\n", ",", "]", "}"):
                self.at += 1
