"""The bundled log is what its script makes, and it has something for every part of the analysis."""

import csv
import io
from collections import Counter

from standalone import sample
from standalone.sample import make


def test_the_script_makes_the_file_that_is_bundled() -> None:
    assert sample.FILE.read_bytes() == make.text().encode()


def test_it_is_a_week_of_several_models_and_users() -> None:
    rows = list(csv.DictReader(io.StringIO(make.text())))
    assert 2000 < len(rows) < 6000
    assert len({row["time"][:10] for row in rows}) == 7
    assert [row["time"] for row in rows] == sorted(row["time"] for row in rows)
    models = Counter(row["model"] for row in rows)
    assert set(models) == {work.model for work in make.WORKLOADS}
    assert len({row["user"] for row in rows}) == 6
    for row in rows:
        inputs, cached, output = (int(row[f"{name}_tokens"]) for name in ("input", "cached_input", "output"))
        assert 0 <= cached <= inputs
        assert inputs > 0
        assert output > 0
    assert sum(int(row["cached_input_tokens"]) > 0 for row in rows) > 200
