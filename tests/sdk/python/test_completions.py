"""Text completions."""

import math

PROMPT = "Once upon a time"


def test_a_completion_has_the_expected_shape(complete, model):
    completion = complete(PROMPT, max_tokens=8)
    assert completion.object == "text_completion"
    assert completion.id.startswith("cmpl-")
    assert completion.model == model
    choice = completion.choices[0]
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    assert choice.text
    assert completion.usage.completion_tokens == 8


def test_sixteen_tokens_are_the_default(complete):
    options = {"extra_body": {"ignore_eos": True}}
    assert complete(PROMPT, **options).usage.completion_tokens == 16


def test_a_stream_adds_up(complete):
    whole = complete(PROMPT, max_tokens=24).choices[0]
    chunks = list(complete(PROMPT, max_tokens=24, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.text
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason


def test_echo_puts_the_prompt_first(complete):
    plain = complete(PROMPT, max_tokens=5).choices[0].text
    assert complete(PROMPT, max_tokens=5, echo=True).choices[0].text == PROMPT + plain
    chunks = complete(PROMPT, max_tokens=5, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == PROMPT + plain


def test_several_prompts_are_answered_in_order(complete):
    prompts = [PROMPT, "The end", "A b c"]
    solo = [complete(prompt, max_tokens=6).choices[0].text for prompt in prompts]
    completion = complete(prompts, max_tokens=6)
    assert [choice.index for choice in completion.choices] == [0, 1, 2]
    assert [choice.text for choice in completion.choices] == solo


def test_n_choices_per_prompt_are_numbered_through(complete):
    completion = complete([PROMPT, "The end"], n=2, max_tokens=4)
    assert [choice.index for choice in completion.choices] == [0, 1, 2, 3]
    texts = [choice.text for choice in completion.choices]
    assert texts[0] == texts[1] and texts[2] == texts[3]
    streamed = [""] * 4
    for chunk in complete([PROMPT, "The end"], n=2, max_tokens=4, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == texts


def test_logprobs_are_parallel_lists(complete):
    choice = complete(PROMPT, max_tokens=5, logprobs=3).choices[0]
    logprobs = choice.logprobs
    assert "".join(logprobs.tokens) == choice.text
    assert len(logprobs.token_logprobs) == len(logprobs.tokens) == 5
    assert logprobs.text_offset[0] == 0
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs):
        assert 3 <= len(top) <= 4
        assert math.isclose(top[token], logprob, abs_tol=1e-4)
        assert logprob == max(top.values())
    offsets = [sum(map(len, logprobs.tokens[:i])) for i in range(5)]
    assert logprobs.text_offset == offsets


def test_a_prompt_is_scored_without_generating(complete):
    choice = complete(PROMPT, max_tokens=0, echo=True, logprobs=1).choices[0]
    assert choice.text == PROMPT
    logprobs = choice.logprobs
    assert "".join(logprobs.tokens) == PROMPT
    assert logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])


def test_scores_of_a_prompt_agree_with_those_of_generation(complete):
    generated = complete(PROMPT, max_tokens=6, logprobs=0, echo=True).choices[0]
    scored = complete(generated.text, max_tokens=0, logprobs=0, echo=True).choices[0]
    if scored.logprobs.tokens == generated.logprobs.tokens:
        pairs = zip(scored.logprobs.token_logprobs[1:], generated.logprobs.token_logprobs[1:])
        assert all(math.isclose(a, b, abs_tol=2e-2) for a, b in pairs)
    else:
        assert "".join(scored.logprobs.tokens) == "".join(generated.logprobs.tokens)


def test_token_ids_are_a_prompt_too(complete):
    plain = complete(PROMPT, max_tokens=6, extra_body={"return_token_ids": True}).choices[0]
    from_ids = complete(plain.prompt_token_ids, max_tokens=6).choices[0]
    assert from_ids.text == plain.text


def test_a_stop_string_ends_a_completion(complete):
    whole = complete(PROMPT, max_tokens=30).choices[0].text
    stop = whole[10:14]
    choice = complete(PROMPT, max_tokens=30, stop=stop).choices[0]
    assert (choice.text, choice.finish_reason) == (whole[: whole.index(stop)], "stop")
