"""The version of stagecut. Saved pipes name it, and pyproject.toml reads it here."""

VERSION = "0.2.0"
