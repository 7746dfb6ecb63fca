"""Packages of the distribution. All other metadata is in pyproject.toml."""

from setuptools import find_packages, setup

# A wheel has the YAMLs inside `recipes`; in a checkout their path stays `hparams`.
setup(
    packages=[*find_packages(include=["trainer*", "recipes*"]), "recipes.hparams"],
    package_dir={"recipes.hparams": "hparams"},
    package_data={
        "trainer": ["py.typed", "report/script.js", "report/style.css"],
        "recipes.hparams": ["**/*.yaml"],
    },
)
