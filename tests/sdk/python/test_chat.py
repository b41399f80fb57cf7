"""Chat completions that come as one answer."""

import math

import pytest
from conftest import SHORT, STORY


def text_of(completion):
    return completion.choices[0].message.content


def test_an_answer_has_the_expected_shape(chat, model):
    completion = chat(SHORT)
    assert completion.object == "chat.completion"
    assert completion.id.startswith("chatcmpl-")
    assert completion.model == model
    choice = completion.choices[0]
    assert (choice.index, choice.finish_reason, choice.message.role) == (0, "stop", "assistant")
    assert choice.message.content
    assert choice.message.tool_calls is None
    assert choice.logprobs is None


def test_usage_counts_prompt_and_output(chat):
    usage = chat(STORY, max_tokens=5).usage
    assert usage.completion_tokens == 5
    assert usage.prompt_tokens > 5
    assert usage.total_tokens == usage.prompt_tokens + 5


def test_text_parts_are_read_as_text(chat):
    parts = [{"type": "text", "text": SHORT[0]["content"]}]
    from_parts = chat([{"role": "user", "content": parts}], max_tokens=20)
    from_text = chat(SHORT, max_tokens=20)
    assert text_of(from_parts) == text_of(from_text)
    assert from_parts.usage.prompt_tokens == from_text.usage.prompt_tokens


def test_every_message_is_part_of_the_prompt(chat):
    system = {"role": "system", "content": "You are a helpful assistant."}
    turns = [system, *SHORT, {"role": "assistant", "content": "Paris."}, *STORY]
    counts = [chat(turns[:end], max_tokens=1).usage.prompt_tokens for end in (2, 4)]
    assert chat(SHORT, max_tokens=1).usage.prompt_tokens < counts[0] < counts[1]


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_output_ends_at_the_token_limit(chat, name):
    completion = chat(STORY, **{name: 7})
    assert completion.usage.completion_tokens == 7
    assert completion.choices[0].finish_reason == "length"


def test_greedy_answers_repeat(chat):
    assert text_of(chat(STORY, max_tokens=40)) == text_of(chat(STORY, max_tokens=40))


def test_a_seed_repeats_a_sampled_answer_and_another_seed_changes_it(chat):
    def sample(seed):
        return text_of(chat(STORY, temperature=1.5, seed=seed, max_tokens=40))

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(8)}) > 1


def test_a_stop_string_ends_the_answer_and_is_cut_off(chat):
    whole = text_of(chat(STORY, max_tokens=60))
    stop = whole[20:26]
    completion = chat(STORY, max_tokens=60, stop=[stop, "no such text"])
    assert text_of(completion) == whole[: whole.index(stop)]
    choice = completion.choices[0]
    assert choice.finish_reason == "stop"
    assert choice.stop_reason == stop
    kept = chat(STORY, max_tokens=60, stop=stop, extra_body={"include_stop_str_in_output": True})
    assert text_of(kept) == whole[: whole.index(stop) + len(stop)]


def test_n_gives_independent_choices(chat):
    completion = chat(STORY, n=3, temperature=1.5, seed=7, max_tokens=30)
    assert [choice.index for choice in completion.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in completion.choices}) > 1
    tokens = completion.usage.completion_tokens
    assert 3 <= tokens <= 90


def test_n_greedy_choices_are_equal(chat):
    completion = chat(STORY, n=3, max_tokens=20)
    assert {choice.message.content for choice in completion.choices} == {
        text_of(chat(STORY, max_tokens=20))
    }


def test_logprobs_describe_every_token(chat):
    completion = chat(STORY, max_tokens=6, logprobs=True, top_logprobs=4)
    entries = completion.choices[0].logprobs.content
    assert len(entries) == 6
    whole = b"".join(bytes(entry.bytes) for entry in entries)
    assert whole.decode() == text_of(completion)
    for entry in entries:
        assert entry.logprob <= 0
        assert len(entry.top_logprobs) == 4
        values = [top.logprob for top in entry.top_logprobs]
        assert values == sorted(values, reverse=True)
        # Greedy: the chosen token is the most likely one.
        assert entry.top_logprobs[0].token == entry.token
        assert math.isclose(entry.top_logprobs[0].logprob, entry.logprob, abs_tol=1e-4)
        assert sum(math.exp(value) for value in values) < 1.0001


def test_logprobs_without_alternatives(chat):
    entries = chat(STORY, max_tokens=3, logprobs=True).choices[0].logprobs.content
    assert [entry.top_logprobs for entry in entries] == [[], [], []]


def test_a_forbidden_token_is_not_chosen(chat, client):
    first = chat(STORY, max_tokens=1, extra_body={"return_token_ids": True}).choices[0]
    token_id = first.token_ids[0]
    other = chat(STORY, max_tokens=1, logit_bias={str(token_id): -100}).choices[0]
    assert other.message.content != first.message.content


def test_parameters_without_effect_are_named_in_a_header(client, model):
    response = client.chat.completions.with_raw_response.create(
        model=model,
        messages=STORY,
        max_tokens=1,
        store=True,
        extra_body={"no_such_parameter": 1},
    )
    names = response.headers["x-ignored-params"].split(",")
    assert set(names) == {"store", "no_such_parameter"}
    assert response.parse().choices[0].finish_reason == "length"


def test_a_continued_message_goes_on_where_it_stopped(chat):
    whole = text_of(chat(STORY, max_tokens=30))
    begun = chat(STORY, max_tokens=10).choices[0].message.content
    messages = [*STORY, {"role": "assistant", "content": begun}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    rest = text_of(chat(messages, max_tokens=20, extra_body=options))
    # The seam may be tokenized differently, but the text must follow on.
    assert rest and not rest.startswith(begun)
    assert (begun + rest)[: len(begun) + 3] == whole[: len(begun) + 3]
