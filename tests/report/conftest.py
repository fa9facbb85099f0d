"""What the pages of a report are looked at with."""

from tests.helpers.browser import chromium  # noqa: F401
