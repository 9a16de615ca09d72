"""The clients that people have, against a server that the test has started: openai's package, and lm_eval.

usage: clients.py URL FOLDER EXPECTED.json    (FOLDER has the tokenizer; EXPECTED what HymbaLm::log_likelihood says)
"""

import json
import os
import pathlib
import sys
import tempfile

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", OPENAI_API_KEY="secret", TOKENIZERS_PARALLELISM="false")

import openai

url, folder, expected_path = sys.argv[1:]
expected = json.loads(pathlib.Path(expected_path).read_text())


def use_openai():
    client = openai.OpenAI(base_url=url + "/v1", api_key="secret", max_retries=0)
    name = client.models.list().data[0].id
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a colour."}]

    answer = client.chat.completions.create(model=name, messages=messages, max_tokens=20, temperature=0)
    assert answer.choices[0].message.role == "assistant" and answer.choices[0].finish_reason == "length", answer
    assert answer.choices[0].message.content == expected["chat"], answer
    assert answer.usage.completion_tokens == 20

    pieces = client.chat.completions.create(
        model=name, messages=messages, max_tokens=20, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    text, usage = "", None
    for piece in pieces:
        text += "".join(choice.delta.content or "" for choice in piece.choices)
        usage = piece.usage or usage
    assert text == expected["chat"] and usage.completion_tokens == 20, (text, usage)

    answer = client.completions.create(model=name, prompt="The sky is", max_tokens=5, n=2, temperature=1, seed=1, logprobs=2)
    assert len(answer.choices) == 2 and len(answer.choices[0].logprobs.token_logprobs) == 5, answer
    pieces = client.completions.create(model=name, prompt="The sky is", max_tokens=5, temperature=1, seed=1, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == answer.choices[0].text

    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    answer = client.chat.completions.create(model=name, messages=messages, response_format=wanted, max_tokens=50)
    assert json.loads(answer.choices[0].message.content)["a"] in (1, 2), answer

    parameters = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Lima"]}}, "required": ["city"], "additionalProperties": False}
    tool = {"type": "function", "function": {"name": "weather", "parameters": parameters}}
    asked = dict(model=name, messages=messages, tools=[tool], tool_choice="required", max_tokens=100, temperature=1, seed=4)
    whole = client.chat.completions.create(**asked).choices[0]
    assert whole.finish_reason == "tool_calls" and whole.message.content is None, whole
    call = whole.message.tool_calls[0]
    assert call.function.name == "weather" and json.loads(call.function.arguments)["city"] in ("Oslo", "Lima"), whole
    with client.chat.completions.stream(**{**asked, "tools": [{**tool, "function": {**tool["function"], "strict": True}}]}) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert streamed.finish_reason == "tool_calls" and not streamed.message.content, streamed
    assert streamed.message.tool_calls[0].function.arguments == call.function.arguments, (streamed, whole)
    # and the result goes back
    told = [*messages, whole.message, {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
    client.chat.completions.create(model=name, messages=told, tools=[tool], max_tokens=5)

    for error, call in [
        (openai.NotFoundError, lambda: client.completions.create(model="another", prompt="a")),
        (openai.BadRequestError, lambda: client.completions.create(model=name, prompt="a", temperature=-1)),
        (openai.AuthenticationError, lambda: client.with_options(api_key="wrong").models.list()),
    ]:
        try:
            call()
        except error as told:
            assert told.body["message"], told
        else:
            raise AssertionError(f"no {error.__name__}")


def use_lm_eval():
    import lm_eval
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as place:
        place = pathlib.Path(place)
        lines = [json.dumps({"text": case["prompt"], "target": case["continuation"]}) for case in expected["cases"]]
        (place / "cases.jsonl").write_text("\n".join(lines))
        (place / "tiny.yaml").write_text(f"""
task: tiny
dataset_path: json
dataset_kwargs:
  data_files:
    test: {place}/cases.jsonl
  cache_dir: {place}/cache
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{target}}}}"
target_delimiter: ""
metric_list:
  - metric: perplexity
    aggregation: perplexity
    higher_is_better: false
""")
        arguments = dict(model="small", base_url=url + "/v1/completions", tokenizer=folder, num_concurrent=4, batch_size=2)
        results = lm_eval.simple_evaluate(
            model="local-completions",
            model_args=arguments,
            tasks=["tiny"],
            task_manager=TaskManager(include_path=str(place), include_defaults=False),
            log_samples=True,
            bootstrap_iters=0,
        )
    worst = 0.0
    assert len(results["samples"]["tiny"]) == len(expected["cases"])
    for sample in results["samples"]["tiny"]:
        case = expected["cases"][sample["doc_id"]]
        log_likelihood, is_greedy = sample["resps"][0][0]
        worst = max(worst, abs(log_likelihood - case["log_likelihood"]))
        assert is_greedy == case["is_greedy"], (sample, case)
    print(f"lm_eval {lm_eval.__version__}: {len(expected['cases'])} log-likelihoods, at most {worst:.2g} away")
    assert worst < 1e-4


use_openai()
print(f"openai {openai.__version__}: as expected")
use_lm_eval()
