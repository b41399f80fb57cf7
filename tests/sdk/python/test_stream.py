"""Chat completions that come as a stream."""

import asyncio
import time

import pytest
from conftest import SHORT, STORY


def test_deltas_add_up_to_the_whole_answer(chat):
    whole = chat(STORY, max_tokens=60).choices[0]
    chunks = list(chat(STORY, max_tokens=60, stream=True))
    first = chunks[0].choices[0].delta
    assert (first.role, first.content) == ("assistant", "")
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:])
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.message.content
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + [whole.finish_reason]
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert all(chunk.usage is None for chunk in chunks)
    assert len(chunks) > 10, "tokens must arrive one by one, not at the end"


def test_usage_comes_in_one_more_chunk_when_asked_for(chat):
    whole = chat(STORY, max_tokens=9).usage
    options = {"include_usage": True}
    chunks = list(chat(STORY, max_tokens=9, stream=True, stream_options=options))
    *others, last = chunks
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (
        whole.prompt_tokens,
        whole.completion_tokens,
    )
    assert all(chunk.usage is None and chunk.choices for chunk in others)


def test_a_stop_string_is_never_shown_even_in_part(chat):
    whole = chat(STORY, max_tokens=60).choices[0].message.content
    stop = whole[30:42]
    chunks = list(chat(STORY, max_tokens=60, stop=stop, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole[: whole.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_choices_are_told_apart_by_index(chat):
    texts = {0: "", 1: "", 2: ""}
    finished = []
    for chunk in chat(STORY, n=3, max_tokens=20, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                finished.append(choice.index)
    assert sorted(finished) == [0, 1, 2]
    assert set(texts.values()) == {chat(STORY, max_tokens=20).choices[0].message.content}


def test_logprobs_stream_with_their_tokens(chat):
    whole = chat(STORY, max_tokens=8, logprobs=True, top_logprobs=2)
    expected = [entry.token for entry in whole.choices[0].logprobs.content]
    streamed = []
    for chunk in chat(STORY, max_tokens=8, logprobs=True, top_logprobs=2, stream=True):
        logprobs = chunk.choices[0].logprobs
        streamed += [entry.token for entry in (logprobs.content or [])] if logprobs else []
    assert streamed == expected


def test_the_stream_helper_accumulates_the_answer(client, chat, model):
    with client.chat.completions.stream(model=model, messages=SHORT, temperature=0) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.content == chat(SHORT).choices[0].message.content


def test_a_cancelled_stream_frees_its_place(chat, client, base_url):
    before = chat(SHORT).choices[0].message.content
    stream = chat(STORY, max_tokens=400, stream=True, extra_body={"ignore_eos": True})
    for _, _chunk in zip(range(5), stream):
        pass
    stream.close()
    wait_until_idle(client, base_url)
    assert chat(SHORT).choices[0].message.content == before


def wait_until_idle(client, base_url):
    """Waits for the gauge of running requests to reach zero."""
    url = base_url.removesuffix("/v1") + "/metrics"
    deadline = time.monotonic() + 20
    running = None
    while time.monotonic() < deadline:
        metrics = client.get(url, cast_to=str)
        lines = [line for line in metrics.splitlines() if line.startswith("vllm:num_requests_running{")]
        assert lines, "the gauge of running requests is missing"
        running = sum(float(line.rsplit(" ", 1)[1]) for line in lines)
        if running == 0:
            return
        time.sleep(0.05)
    pytest.fail(f"{running} requests still run after the client went away")


WORDS = "sheep baker ant duck lion fox king farmer dog cat bear goat bee mouse owl frog".split()


@pytest.mark.parametrize("num_clients", [16, 64])
def test_concurrent_streams_equal_their_solo_answers(async_client, chat, model, num_clients):
    prompts = [
        [{"role": "user", "content": f"Tell me a story about a {WORDS[i % 16]} and number {i // 16}."}]
        for i in range(num_clients)
    ]
    lengths = [12 + 5 * (i % 6) for i in range(num_clients)]
    solo = [
        chat(prompt, max_tokens=length).choices[0].message.content
        for prompt, length in zip(prompts, lengths)
    ]

    async def one(client, prompt, length):
        stream = await client.chat.completions.create(
            model=model, messages=prompt, max_tokens=length, temperature=0, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def all_at_once():
        async with async_client() as client:
            jobs = [one(client, prompt, length) for prompt, length in zip(prompts, lengths)]
            return await asyncio.gather(*jobs)

    assert asyncio.run(all_at_once()) == solo


def test_some_clients_may_leave_while_others_stay(async_client, chat, model):
    async def one(client, leaves):
        stream = await client.chat.completions.create(
            model=model, messages=STORY, max_tokens=60, temperature=0, stream=True
        )
        text = ""
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
            if leaves and len(text) > 20:
                await stream.close()
                return None
        return text

    async def all_at_once():
        async with async_client() as client:
            return await asyncio.gather(*(one(client, i % 2 == 0) for i in range(12)))

    texts = asyncio.run(all_at_once())
    assert set(texts[1::2]) == {chat(STORY, max_tokens=60).choices[0].message.content}
