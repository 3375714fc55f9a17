"""A run as one HTML page that needs nothing but itself: `report.html` in the run folder.

    python -m latent_critic.engine.html_report runs/zero3_dit

A training run writes it at each checkpoint and at its end. All that it shows is read from the run folder. Whatever
comes from there - prompts, names, configuration - is escaped by Jinja, and the page's own policy lets a browser load
nothing from elsewhere and run no other script than the page's.
"""

import base64
import hashlib
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from .content import read_content

FILE = "report.html"
_HERE = Path(__file__).parent


def write_report(run_dir: Path) -> Path:
    """Writes the report of a run, ended or not. Raises UserError where the folder holds no run."""
    templates = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    style, script = (_HERE.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    page = templates.get_template("page.html.j2").render(
        run=read_content(run_dir),
        style=Markup(style),
        script=Markup(script),
        policy=f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'",
    )
    path = run_dir / FILE
    partial = path.with_name(f".{FILE}.partial")  # a browser may be reading
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)
    return path


def _hash(text: str) -> str:
    """As a content security policy names an inline style or script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
