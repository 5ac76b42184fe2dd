"""The site builds without a warning: every page is in it, and every link between pages and names is right."""

import re

import pytest
from pages import ROOT

import rftcore

pytest.importorskip("sphinx", reason='no Sphinx: pip install -e ".[docs]"')
pytest.importorskip("myst_parser", reason='no MyST: pip install -e ".[docs]"')
pytest.importorskip("furo", reason='no furo: pip install -e ".[docs]"')

NAMES = [f"rftcore.{name}" for name in rftcore.__all__ if name != "__version__"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    from sphinx.application import Sphinx

    folder = tmp_path_factory.mktemp("site")
    with open(folder / "warnings", "w+") as warnings:
        app = Sphinx(
            ROOT / "docs", ROOT / "docs", folder / "out", folder / "doctrees", "dummy",
            confoverrides={"nitpicky": True}, status=None, warning=warnings, freshenv=True,
        )  # fmt: skip
        app.build()
        warnings.seek(0)
        return app, re.sub(r"\x1b\[[\d;]*m", "", warnings.read())


def test_no_warnings(site):
    assert site[1] == ""


@pytest.mark.parametrize(
    "name", [*NAMES, "rftcore.sampling.Plan", "rftcore.training.load_config", "rftcore.rewards.declare"]
)
def test_public_names_are_described(site, name):
    objects = {entry[0] for entry in site[0].env.get_domain("py").get_objects()}
    assert name in objects
