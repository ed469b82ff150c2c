"""Where hypothesis keeps its own files: outside of the repository, for one session."""

from __future__ import annotations

import tempfile

import hypothesis.configuration

_HOME = tempfile.TemporaryDirectory(prefix="tlora-fuzz-")
hypothesis.configuration.set_hypothesis_home_dir(_HOME.name)
