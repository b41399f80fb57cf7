"""Models and the ways a request is refused, as the client's exceptions."""

import pytest
from conftest import STORY
from openai import (
    APIStatusError,
    AuthenticationError,
    BadRequestError,
    NotFoundError,
    OpenAI,
)


def test_the_model_is_listed_and_found(client, model):
    card = client.models.retrieve(model)
    assert card.id == model
    assert card.object == "model"
    assert card.created > 1_600_000_000
    assert card.max_model_len >= 512
    assert model in [listed.id for listed in client.models.list()]


def test_an_unknown_model_is_not_found(client):
    with pytest.raises(NotFoundError) as error:
        client.models.retrieve("no-such-model")
    assert "no-such-model" in error.value.message
    with pytest.raises(NotFoundError):
        client.chat.completions.create(model="no-such-model", messages=STORY)
    with pytest.raises(NotFoundError):
        client.completions.create(model="no-such-model", prompt="a")


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"max_tokens": -3}, "max_tokens"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 1000}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": []}, "tools"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"extra_body": {"top_k": "many"}}, "top_k"),
    ],
)
def test_a_wrong_value_names_its_parameter(client, model, options, param):
    with pytest.raises(BadRequestError) as error:
        client.chat.completions.create(**{"model": model, "messages": STORY, **options})
    assert error.value.param == param
    assert param.split("[")[0] in error.value.message
    assert error.value.type == "BadRequestError"


def test_a_prompt_beyond_the_context_is_refused(client, model):
    limit = client.models.retrieve(model).max_model_len
    with pytest.raises(BadRequestError) as error:
        client.completions.create(model=model, prompt=[5] * (limit + 1), max_tokens=1)
    assert str(limit) in error.value.message


def test_an_image_is_refused_by_its_place(client, model):
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    with pytest.raises(BadRequestError) as error:
        client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": [image]}]
        )
    assert error.value.param.startswith("messages[0].content[0]")


def test_an_unknown_route_is_not_found(client):
    with pytest.raises(NotFoundError):
        client.post("/no/such/route", body={}, cast_to=object)


def test_broken_json_is_a_bad_request(client):
    with pytest.raises(APIStatusError) as error:
        client.post(
            "/chat/completions",
            content=b"{",
            cast_to=object,
            options={"headers": {"content-type": "application/json"}},
        )
    assert error.value.status_code == 400


def test_a_guarded_server_wants_its_key(guarded):
    url, key = guarded
    for wrong in ["wrong", key + "x"]:
        stranger = OpenAI(base_url=url, api_key=wrong, max_retries=0)
        with pytest.raises(AuthenticationError):
            stranger.models.list()
        with pytest.raises(AuthenticationError):
            stranger.chat.completions.create(model="tiny", messages=STORY)
    friend = OpenAI(base_url=url, api_key=key, max_retries=0)
    assert friend.models.list().data
