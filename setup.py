"""What a package index shows: README without links and pictures that lead into the repository."""

import re
from pathlib import Path

from setuptools import setup

PICTURE = re.compile(r"^!\[[^\]]*\]\((?!\w+:)[^)]*\)\n+", re.MULTILINE)
LINK = re.compile(r"\[([^\]]+)\]\((?!\w+:|#)[^)]*\)")

readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")

setup(
    long_description=LINK.sub(r"\1", PICTURE.sub("", readme)),
    long_description_content_type="text/markdown",
)
