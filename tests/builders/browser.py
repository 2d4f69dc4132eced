"""The browser that tests look at pages with."""

from __future__ import annotations

import os
import shutil

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

needs_chromium = pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("CI"), reason="no chromium on PATH (apt-get install chromium)"
)
"""Of tests that are skipped without it. CI must have it."""
