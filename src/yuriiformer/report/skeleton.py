"""What every page shares: one self-contained file that opens from the file system and asks no network."""

from __future__ import annotations

from typing import Any

import jinja2

BASE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{% block title %}{% endblock %} – YuriiFormer</title>
<style>
body { font: 16px/1.55 system-ui, sans-serif; max-width: 66rem; margin: 0 auto; padding: 1rem 1.2rem 4rem; color: #222; background: #fff; }
h1 { font-size: 1.7rem; margin: .6rem 0; } h2 { font-size: 1.2rem; margin: 2.4rem 0 .4rem; }
p.say { color: #555; margin: .2rem 0 .6rem; }
.verdict { overflow-wrap: anywhere; background: #f3f6f9; border-left: 4px solid #0072B2; padding: .7rem 1rem; margin: .6rem 0; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .87rem; }
th, td { padding: .35rem .6rem; text-align: right; border-bottom: 1px solid #ddd; font-variant-numeric: tabular-nums; }
th { vertical-align: bottom; } th:first-child, td:first-child { text-align: left; }
figure { margin: .4rem 0 1.4rem; max-width: 50rem; } svg { width: 100%; height: auto; }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; white-space: pre-wrap; font-size: .83rem; }
footer { margin-top: 3rem; color: #777; font-size: .85rem; }
{% block style %}{% endblock %}
</style>
{% block body %}{% endblock %}
</html>
"""


def render(page: str, **values: Any) -> str:
    """A template that says `{% extends "base" %}` and fills the blocks title, style and body, as HTML."""
    loader = jinja2.DictLoader({"base": BASE, "page": page})
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.get_template("page").render(**values)
