"""Packages of the distribution. All other metadata is in pyproject.toml."""

from setuptools import find_namespace_packages, find_packages, setup

# A wheel has the YAMLs inside `recipes`; in a checkout their path stays `hparams`.
tasks = [f"recipes.hparams.{task}" for task in find_namespace_packages("hparams")]
setup(
    packages=[*find_packages(include=["trainer*", "recipes*"]), "recipes.hparams", *tasks],
    package_dir={"recipes.hparams": "hparams"},
    include_package_data=False,  # of the source distribution, a wheel has what is listed here
    package_data={
        "": ["*.yaml"],
        "trainer": ["py.typed", "report/script.js", "report/style.css"],
    },
)
