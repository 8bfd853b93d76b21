from align_pipeline.pipeline.graph import find_cycle, needs, order
from toy_stages import Toy, ToyReport

STAGES = {
    "report": ToyReport(models={"b": "stage:b", "a": "stage:a", "again": "stage:b"}),
    "b": Toy(model="stage:a"),
    "a": Toy(data="file:rows.jsonl"),
    "alone": Toy(),
}


def test_each_stage_comes_after_what_it_reads():
    assert order(STAGES) == ["a", "b", "report", "alone"]
    assert order(STAGES, ["b"]) == ["a", "b"]
    assert needs(STAGES["report"]) == ["b", "a"]
    assert needs(STAGES["a"]) == []


def test_inputs_inside_a_configuration_are_edges():
    judged = ToyReport(models={"a": "stage:a"}, judge={"model": "stage:b", "reward": "stage:r"})
    assert needs(judged) == ["a", "b", "r"]


def test_a_cycle_is_named_from_where_it_closes():
    assert find_cycle({"x": ["a"], "a": ["b"], "b": ["c"], "c": ["a"]}) == ["a", "b", "c", "a"]
    assert find_cycle({"a": ["a"]}) == ["a", "a"]
    assert find_cycle({"a": ["b", "c"], "b": ["c"], "c": []}) is None
