"""Rows and files for hypothesis: sound ones with what they mean, spoiled ones with their place."""

import csv
import io
import json

from hypothesis import strategies as st

# Text that is hard to carry: quotes, line ends, separators of other alphabets, right-to-left.
HARD = st.sampled_from(
    [
        'say "hi"',
        "two\nlines",
        "a\r\nb",
        "a,b;c\td",
        "\u2028x\u2029",
        "مرحبا",
        "𝕏🦜",
        "{",
        "]",
        "\\",
        "''",
    ]
)
PLAIN = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12
)
TEXT = (PLAIN | HARD).filter(str.strip)
NOT_TEXT = [None, 3, 1.5, True, [], {}, [1], {"a": 1}, "", " \t", "a\0b", "\ud83d", [[]], [None]]


def turns(texts, names=("role", "content", "user", "assistant")):
    who, what, user, assistant = names
    return [{who: (user, assistant)[n % 2], what: text} for n, text in enumerate(texts)]


def messages(*texts):
    return tuple(turns(texts))


@st.composite
def sound_rows(draw, kind):
    """(row of schema `kind`, what its loader must make of it, without where it stands)."""
    a, b, c = draw(TEXT), draw(TEXT), draw(TEXT)
    if kind == "alpaca":
        extra = draw(st.sampled_from(["", " ", None, c]))
        asked = a + ("\n\n" + c if extra == c and c.strip() else "")
        return {"instruction": a, "input": extra, "output": b}, messages(asked, b)
    if kind == "messages":
        texts = draw(st.sampled_from([(a, b), (a, b, c, a)]))
        system = [{"role": "system", "content": c}] if draw(st.booleans()) else []
        return {"messages": system + turns(texts)}, (*system, *messages(*texts))
    if kind == "conversations":
        return {"conversations": turns((a, b), ("from", "value", "human", "gpt"))}, messages(a, b)
    if kind == "prompt_completion":
        return {"prompt": a, "completion": b}, messages(a, b)
    if kind == "preference":
        worse = c if c != b else c + "!"
        if draw(st.booleans()):
            row = {"chosen": turns((a, b)), "rejected": turns((a, worse))}
        else:
            row = {"prompt": a, "chosen": b, "rejected": worse}
        return row, (messages(a), (b, worse), (1.0, 0.0))
    answers = [a, b + "2", c + "3"]
    scores = draw(st.lists(st.integers(-9, 9) | st.floats(-9, 9), min_size=3, max_size=3))
    scores = [score if scores.index(score) == n else score + n for n, score in enumerate(scores)]
    row = {"prompt": c, "responses": answers, "scores": scores}
    return row, (messages(c), tuple(answers), tuple(map(float, scores)))


NEEDED = {
    "alpaca": ("instruction", "output"),
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "preference": ("chosen", "rejected"),
    "kwise": ("prompt", "responses", "scores"),
}
CSV_KINDS = ("alpaca", "prompt_completion")


@st.composite
def spoiled_rows(draw, kind):
    """A row that no reader could use, as a value that JSON can write."""
    row, _ = draw(sound_rows(kind))
    name = draw(st.sampled_from(NEEDED[kind]))
    how = draw(st.sampled_from(["type", "type", "gone", "system", "inside", "no object"]))
    if how == "gone":
        return {key: value for key, value in row.items() if key != name}
    if how == "system":
        return row | {"system": draw(st.sampled_from([3, [], {}, True, "a\0"]))}
    if how == "no object":
        return draw(st.sampled_from([None, 3, "text", [], [row], True, 1.5]))
    if how == "inside" and isinstance(row[name], list):
        return row | {name: draw(spoiled_list(row[name], kind, name))}
    if how == "inside" and kind == "preference":
        return row | {"rejected": row["chosen"]}
    return row | {name: draw(st.sampled_from(NOT_TEXT))}


@st.composite
def spoiled_list(draw, value, kind, name):
    """Turns, responses or scores with one fault."""
    if name == "scores":
        bad = [None, "1", True, float("nan"), float("inf"), 10**400, [1]]
        return draw(st.sampled_from([value[:-1], [*value, 1], *([*value[:-1], x] for x in bad)]))
    if name == "responses":
        bad = [value[:-1], value[:1] * 3, [*value[:-1], ""], [*value[:-1], None], value[0]]
        return draw(st.sampled_from(bad))
    content = "value" if "value" in value[-1] else "content"
    role = "from" if content == "value" else "role"
    last = value[-1]
    return draw(
        st.sampled_from(
            [
                value[:1] * 2,  # nobody answers
                [*value, last],
                [*value[:-1], last | {role: "robot"}],
                [*value[:-1], last | {role: None}],
                [*value[:-1], last | {content: ""}],
                [*value[:-1], last | {content: 7}],
                [*value[:-1], {role: last[role]}],
                [*value[:-1], "text"],
                [last],
            ]
        )
    )


def line_of(row) -> str:
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()


@st.composite
def spoiled_lines(draw, kind):
    """Bytes of one line that is no row: spoiled in its values, its JSON or its bytes."""
    row, _ = draw(sound_rows(kind))
    line = json.dumps(row, ensure_ascii=draw(st.booleans())).encode()
    at = draw(st.integers(1, len(line) - 1))
    how = draw(st.integers(0, 9))
    if how == 0:
        return line[:at]  # an object cut anywhere is no JSON
    if how == 1:
        return line[:at] + b"\0" + line[at:]
    if how == 2:
        return line[:at] + draw(st.sampled_from([b"\xff", b"\xc3", b"\xed\xa0\x80"])) + b"{" + line
    if how == 3:
        return line + line
    if how == 4:
        name = next(iter(row))
        return line[:-1] + b", " + json.dumps(name).encode() + b": 1}"  # a name twice
    if how == 5:
        depth = draw(st.sampled_from([150, 4000, 200_000]))
        return line[:-1] + b', "x": ' + b"[" * depth + b"]" * depth + b"}"
    if how == 6:
        value = draw(st.sampled_from([b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"01", b"+1"]))
        return line[:-1] + b', "x": ' + value + b"}"
    return json.dumps(draw(spoiled_rows(kind))).encode()


@st.composite
def row_files(draw):
    """(kind, file ending, content, sound rows [(what, where)], places of the spoiled ones)."""
    kind = draw(st.sampled_from(list(NEEDED)))
    ending = draw(st.sampled_from([".jsonl", ".jsonl", ".jsonl.gz", ".json", ".csv"]))
    if ending == ".csv":
        kind = draw(st.sampled_from(CSV_KINDS))
    marks = draw(st.lists(st.booleans(), max_size=4))
    sound, spoiled, pieces, line = [], [], [], 1
    if ending == ".csv":
        header = [*NEEDED[kind]] + (["input"] if kind == "alpaca" else [])
        pieces.append(csv_line(header))
        line = 2
    for number, is_sound in enumerate([True, *marks], 1):
        if is_sound:
            row, what = draw(sound_rows(kind))
        if ending == ".csv":
            if is_sound:
                row = {name: value or "" for name, value in row.items()}
                piece = csv_line([row[name] for name in header])
            else:
                piece = draw(spoiled_csv(kind, header))
        elif ending == ".json":
            piece = json.dumps(row if is_sound else draw(spoiled_rows(kind))).encode()
        else:
            piece = line_of(row).encode() if is_sound else draw(spoiled_lines(kind))
        where = f"[{number}]" if ending == ".json" else f":{line}"
        sound += [(what, where)] if is_sound else []
        spoiled += [] if is_sound else [where]
        end = b"" if ending == ".csv" else draw(st.sampled_from([b"\n", b"\r\n", b"\n \n"]))
        pieces.append(piece + end)
        line += pieces[-1].count(b"\n")
    content = b"[" + b",".join(pieces) + b"]" if ending == ".json" else b"".join(pieces)
    if ending == ".jsonl":
        content = draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + content
    return kind, ending, content, sound, spoiled


def csv_line(fields) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL).writerow(fields)
    return text.getvalue().encode()


@st.composite
def spoiled_csv(draw, kind, header):
    row, _ = draw(sound_rows(kind))
    fields = [row[name] or "" for name in header]
    flat = [f.replace("\n", " ").replace("\r", " ") for f in fields]
    how = draw(st.integers(0, 4))
    if how == 0:
        return csv_line([*flat, "more"])
    if how == 1:
        return csv_line([" ", *flat[1:]])
    if how == 2:
        return b"\xff" + csv_line(flat)
    if how == 3:
        return b"\0" + csv_line(flat)
    return b'"x"y' + csv_line(flat)
