"""The parts of the build that pyproject.toml cannot say: recipes/ and rewards/ become packages inside cispo.

A top-level package `rewards` would hide a user's own folder of that name.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["cispo", "cispo.*"]), "cispo.recipes", "cispo.rewards"],
    package_dir={"cispo.recipes": "recipes", "cispo.rewards": "rewards"},
    package_data={
        "cispo.commands.view": ["templates/*.j2"],
        "cispo.compare": ["templates/*.j2"],
        "cispo.recipes": ["*.yaml", "schema.json", "tokenizers/*/*"],
    },
)
