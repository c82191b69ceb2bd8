"""The page of a sweep says first what was learnt, and names what it compares."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from datetime import date

from fastvl_lab import SweepSettings, sweep
from fastvl_lab.view.report import report_html


def test_a_reader_meets_sentences_first_and_every_name_explained(sweep_settings: Callable[..., SweepSettings]) -> None:
    settings = sweep_settings(image_sizes=[[96, 64]], prompt="<b>?")
    result = sweep(settings, progress=False)
    page = report_html(result)
    body = html.unescape(re.sub(r"<script.*?</script>|<style.*?</style>", "", page, flags=re.DOTALL))
    parts = re.findall(r"<h2>(.*?)</h2>", body)
    assert parts[:3] == ["What was learnt on this machine", "Engines", "Summary"]
    assert all(body.index(line) < body.index("<h2>Summary") for line in result.findings())
    assert re.search(r"<td>fastest</td>\s*<td>.*vit.tower=lean", body)  # what it is made of
    assert re.search(r"<td>transformers</td>\s*<td>as it is</td>", body)
    assert f"date {date.today().isoformat()}" in body or result.environment["date"] in body
    assert result.environment["processor"] in body
    assert "<th>fastest, ms</th>" in body.replace(' style="text-align: left;"', "")
    assert re.search(r"<td>image sizes</td>\s*<td>96×64</td>", body)
    assert "['" not in body  # no raw list
    assert "nan" not in re.findall(r"[a-z]+", re.sub(r"<[^>]*>", " ", body).lower())
