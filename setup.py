"Packaging: everything that varies is in settings.ini."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here/"settings.ini", encoding="utf-8")
s = config["DEFAULT"]

setup(
    name=s["lib_name"], version=s["version"], description=s["description"], keywords=s["keywords"].split(),
    author=s["author"], author_email=s["author_email"], license="Apache-2.0", url=s["git_url"],
    long_description=(here/"README.md").read_text(encoding="utf-8"), long_description_content_type="text/markdown",
    packages=find_packages(include=["hpl_nb", "hpl_nb.*"]), include_package_data=False,
    package_data={"hpl_nb": ["py.typed", "*.pyi", "resources/*.csv", "resources/*.json"]}, # resources is a link to data/
    python_requires=f">={s['min_python']}", install_requires=s["requirements"].split(),
    extras_require={"dev": s["dev_requirements"].split(), "gp": s["gp_requirements"].split(),
                    "ray": s["ray_requirements"].split()}, zip_safe=False,
    entry_points={"console_scripts": [line.strip() for line in s["console_scripts"].splitlines() if line.strip()],
                  "nbdev": [f"{s['lib_path']}={s['lib_path']}._modidx:d"]},
    classifiers=["Programming Language :: Python :: 3", "Intended Audience :: Science/Research", "Typing :: Typed",
                 "Topic :: Scientific/Engineering :: Artificial Intelligence"],
)
