"""Everything is in pyproject.toml; this file is where extensions are built."""

from setuptools import setup

setup()
