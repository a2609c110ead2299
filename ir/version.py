"""The version of stagecut, which saved pipes name. pyproject.toml has the same."""

VERSION = "0.1.0"
