"""How is pdiffcopy installed? The requirements stand in the requirements files."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def get_requirements(name):
    """The requirements in a file, one a line."""
    lines = (HERE / name).read_text(encoding="utf-8").splitlines()
    return [line for line in map(str.strip, lines) if line and not line.startswith(("#", "-"))]


setup(
    name="pdiffcopy",
    version=re.search(r'^__version__ = "(.+)"$', (HERE / "pdiffcopy/__init__.py").read_text(), re.MULTILINE)[1],
    description="Fast synchronization of large binary files, inspired by rsync",
    long_description=(HERE / "README.rst").read_text(encoding="utf-8"),
    long_description_content_type="text/x-rst",
    license="MIT",
    # With this an editable installation is a path, not a hook that each start of Python has to import (10 ms).
    package_dir={"": "."},
    packages=find_packages(include=["pdiffcopy", "pdiffcopy.*"]),
    package_data={"pdiffcopy": ["py.typed"]},
    python_requires=">=3.10",
    install_requires=get_requirements("requirements.txt"),
    extras_require={
        "client": get_requirements("requirements-client.txt"),
        "server": get_requirements("requirements-server.txt"),
    },
    entry_points={"console_scripts": ["pdiffcopy = pdiffcopy.__main__:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: System Administrators",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: System :: Archiving :: Mirroring",
        "Topic :: System :: Networking",
    ],
)
