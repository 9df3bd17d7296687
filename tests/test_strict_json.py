"""Strict JSON reads back as what was written, and stays readable."""

import json
import math

from tve_hf.files import dumps


def test_values_come_back_and_infinities_as_strings():
    value = {"a": [1, 2.5, None, "x, [y]\n"], "b": {"c": [[1, 2], [3]]}, "d": [math.inf, -math.inf, math.nan]}
    for indent in (None, 1):
        read = json.loads(dumps(value, indent))
        assert read["a"] == value["a"] and read["b"] == value["b"]
        assert read["d"] == ["inf", "-inf", "nan"]


def test_lists_of_plain_values_stand_on_one_line():
    assert dumps({"values": [1, 2, 3], "more": {"x": [4.5]}}, indent=1).splitlines() == [
        "{",
        ' "values": [1, 2, 3],',
        ' "more": {',
        '  "x": [4.5]',
        " }",
        "}",
    ]
