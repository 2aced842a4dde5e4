"""Whether a text is JSON that a schema allows; asked in processes of their own (formats.py)."""

import json

import jsonschema


def valid(schema: str, text: str) -> bool | str:
    """Whether a text is JSON that a schema allows. schema: as JSON; where it is none: why."""

    def no_number(name: str):
        raise ValueError(f"{name} is no JSON")

    schema = json.loads(schema)
    kind = jsonschema.validators.validator_for(schema)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        return error.message
    try:
        return kind(schema).is_valid(json.loads(text, parse_constant=no_number))
    except ValueError:
        return False
