"""b2s schema: what an editor needs to check and complete transformations.yaml."""

from __future__ import annotations

import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    """The options of b2s schema."""
    parser.epilog = (
        "b2s schema > transformations.schema.json, and as first line of transformations.yaml:\n"
        "# yaml-language-server: $schema=./transformations.schema.json"
    )


def execute(arguments: argparse.Namespace) -> int:
    """Prints the JSON Schema; it is JSON with or without --json, and needs no database."""
    from b2s.config import json_schema
    from b2s.output import print_json

    print_json(json_schema())
    return 0
