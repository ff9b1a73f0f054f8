"""List the packages of the wheel: jgpt, and configs/ inside it, where `--config NAME` finds them."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["jgpt*"]), "jgpt._configs"], package_dir={"jgpt._configs": "configs"})
