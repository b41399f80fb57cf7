"""Clients for the servers that run.sh started.

The suite talks to the real binary with the bundled model. Greedy answers are deterministic, so
tests compare them with each other; what the model must know is all in test_knowledge.py.
"""

import os

import pytest
from openai import AsyncOpenAI, OpenAI

STORY = [{"role": "user", "content": "Tell me a story about a sheep in the meadow."}]
SHORT = [{"role": "user", "content": "What is the capital of France?"}]


def required(name):
    value = os.environ.get(name)
    if not value:
        pytest.exit(f"{name} is not set; start this suite with tests/sdk/run.sh", returncode=2)
    return value


@pytest.fixture(scope="session")
def base_url():
    return required("TOKENMILL_BASE_URL")


@pytest.fixture(scope="session")
def client(base_url):
    return OpenAI(base_url=base_url, api_key="unused", max_retries=0, timeout=120)


@pytest.fixture
def async_client(base_url):
    """Makes a client inside the running event loop."""
    return lambda: AsyncOpenAI(base_url=base_url, api_key="unused", max_retries=0, timeout=300)


@pytest.fixture(scope="session")
def guarded():
    """Base URL and key of the server that wants a key."""
    return required("TOKENMILL_GUARDED_URL"), required("TOKENMILL_GUARDED_KEY")


@pytest.fixture(scope="session")
def model(client):
    return client.models.list().data[0].id


@pytest.fixture(scope="session")
def chat(client, model):
    """A greedy chat completion; keywords as the client takes them."""

    def create(messages, **options):
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return client.chat.completions.create(
            model=model, messages=messages, **{"temperature": 0, **options}
        )

    return create


@pytest.fixture(scope="session")
def complete(client, model):
    """A greedy text completion."""

    def create(prompt, **options):
        return client.completions.create(model=model, prompt=prompt, **{"temperature": 0, **options})

    return create
