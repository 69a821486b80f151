"""Writes recipes/schema.json, from which editors complete recipes."""

from pathlib import Path

from cispo.recipe.load import json_schema

if __name__ == "__main__":
    (Path(__file__).parents[1] / "recipes" / "schema.json").write_text(json_schema())
