"""Renders every template with every case in Jinja2, configured as `transformers` does it.

The results are the expectations of `templates.rs`: `python render.py > expected.json`.
Needs only jinja2 (3.1). A case that a template refuses is recorded with the template's words.
"""

import json
import pathlib

from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

HERE = pathlib.Path(__file__).parent
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


class Generation(Extension):
    """`{% generation %}` prints its body."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        call = self.call_method("print_body")
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def print_body(self, caller):
        return caller()


def raise_exception(message):
    raise TemplateError(message)


def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def environment():
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    return env


def main():
    cases = json.loads((HERE / "cases.json").read_text())
    expected = {}
    for path in sorted(HERE.glob("*.jinja")):
        template = environment().from_string(path.read_text())
        for name, case in cases.items():
            variables = {"tools": None, "documents": None, **TOKENS, **case}
            try:
                result = {"text": template.render(**variables)}
            except TemplateError as error:
                result = {"refused": str(error)}
            expected[f"{path.stem}/{name}"] = result
    print(json.dumps(expected, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
