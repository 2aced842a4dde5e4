"""What SECURITY.md promises."""

import ast
import json
import re
import subprocess
import sys

import pytest

from step1_sft.config import SFTConfig
from tests.helpers.running import ROOT, files_of
from utils.data import chat_template
from utils.settings import command_line
from utils.settings.secrets import hidden
from utils.terminal import visible

STEPS = ("step1_sft", "step2_reward", "step3_ppo", "step3_preference")
CODE = [
    path
    for folder in ("utils", *STEPS, "evaluation", "benchmarks")
    for path in files_of(ROOT / folder, "*.py")
]
NEEDED = "--output_dir out --model_name_or_path model --sft_data d".split()


# Code from files.


def calls(path):
    """(dotted name, keyword arguments) of every call in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}


def faults_of(path) -> list[str]:
    """Calls that would run what a file or a name says."""
    found = []
    for name, given in calls(path):
        last = name.rpartition(".")[2]
        if last in ("load", "torch_load") and name.startswith("torch"):
            found += [name] if given.get("weights_only") != "True" else []
        elif name in ("eval", "exec", "os.system", "os.popen") or name.startswith("pickle."):
            found.append(name)
        elif given.get("shell", "False") != "False" or given.get("trust_remote_code") == "True":
            found.append(f"{name}({given})")
        elif given.get("weights_only", "True") != "True":
            found.append(name)
    return found


def test_no_code_runs_what_a_file_says(tmp_path):
    assert len(CODE) > 40
    found = {str(p.relative_to(ROOT)): f for p in CODE if (f := faults_of(p))}
    # Programs of a policy run in a process that has given up what it could do harm with.
    assert found == {"utils/rewards/confined.py": ["exec"]}
    bad = tmp_path / "bad.py"
    for line in (
        "torch.load(x)",
        "torch.load(x, weights_only=False)",
        "pickle.loads(x)",
        "subprocess.run(x, shell=True)",
        "os.system(x)",
        "eval(x)",
        "f(trust_remote_code=True)",
    ):
        bad.write_text(line)
        assert faults_of(bad), line


@pytest.mark.parametrize("asked", [False, True])
def test_a_models_program_is_warned_of(asked, monkeypatch, capsys):
    flags = ["--trust_remote_code"] if asked else []
    monkeypatch.setattr(sys, "argv", ["main.py", *NEEDED, *flags])
    config = command_line.parse(SFTConfig, "")
    assert config.trust_remote_code is asked
    assert ("warning: trust_remote_code runs" in capsys.readouterr().err) is asked
    assert SFTConfig().trust_remote_code is False


def test_a_template_cannot_reach_python(tiny, tmp_path):
    """Chat templates are programs too: jinja's sandbox keeps them from the interpreter."""
    tokenizer = chat_template.load_tokenizer(str(tiny / "base_model"))
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    tokenizer.chat_template = escape
    with pytest.raises(chat_template.TemplateError, match="unsafe"):
        chat_template.encode_prompt(tokenizer, [{"role": "user", "content": "a"}])


# Shells.

HOSTILE = ["a b", "$(touch ran)", "`touch ran`", "; touch ran", "a'b", 'a"b', "*", "-n", "a\nb"]


def bash(script, cwd, *words, **environment):
    return subprocess.run(
        ["bash", "-c", script, "bash", *words],
        cwd=cwd,
        env={"PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


LAUNCH = f'exec {sys.executable} "{ROOT}/utils/launch.py" step1_sft/main.py "$@"'
ENVIRONMENT = {"PYTHON": "./fake_python", "DS_ACCELERATOR": "cpu", "HOME": "/nowhere"}
FAKE = """#!/bin/sh
shift; shift; shift; shift
for word in "$@"; do printf '%s\\0' "$word"; done > words
"""


def fake(folder):
    (folder / "fake_python").write_text(FAKE)
    (folder / "fake_python").chmod(0o755)


@pytest.mark.parametrize("word", HOSTILE)
def test_names_of_data_reach_the_program_as_they_are(tmp_path, word):
    fake(tmp_path)
    argv = ["--sft_data", word, "--output_dir", f"out {word}".replace("\n", " ")]
    done = bash(LAUNCH, tmp_path, *argv, LAUNCH="--num_gpus 1", **ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    passed = (tmp_path / "words").read_text().split("\0")[:-1]
    assert passed[-4:] == argv and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("word", [w for w in HOSTILE if w not in ("a b", "-n")])
def test_words_that_another_machines_shell_would_obey_are_refused(tmp_path, word):
    fake(tmp_path)
    for flags in ("--hostfile hosts", "-H hosts"):
        done = bash(LAUNCH, tmp_path, "--sft_data", word, LAUNCH=flags, **ENVIRONMENT)
        assert done.returncode == 2 and "--config" in done.stderr
    assert not (tmp_path / "words").exists()


def test_shell_scripts_quote_what_they_pass_on():
    """Every use of a data or output variable stands in double quotes, but for $data, names apart by
    spaces."""
    names = r"OUTPUT|MODEL|REWARD|ROOT|PYTHON|comparisons|step"
    for path in (ROOT / "run_all.sh", ROOT / "utils/launch.sh", *ROOT.glob("step*/launch/*.sh")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            code = re.sub(r"(^|\s)#.*", "", line)
            code = re.sub(r'"[^"]*"', '""', code)  # what is quoted is fine
            code = re.sub(r"\[\[.*?\]\]|\$\{#[^}]*\}|^\s*\w+=\S*|\s\w+=\S*", "", code)
            if not code.strip().startswith("case $step in"):
                assert not re.search(rf"\$\{{?({names})\b", code), f"{path}:{number}: {line}"


# Text of models.

EVIL = "\x1b[2J\x1b]0;owned\x07\r\x9b31m\u202etxt.exe\u2066"


def test_text_of_models_cannot_steer_a_terminal(tiny, tmp_path):
    shown = visible(f"a{EVIL}b\n\tc")
    assert shown.endswith("b\n\tc") and shown.startswith("a\\x1b[2J") and "\\u202e" in shown
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", shown)
    tokenizer = chat_template.load_tokenizer(str(tiny / "base_model"))
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": EVIL}]
    text = chat_template.show(tokenizer, chat_template.encode_conversation(tokenizer, messages))
    ours = re.sub("\033\\[(32|90|0)m", "", text)  # the colours are our own
    assert "\x1b" not in ours and "\x07" not in ours


# Secrets.

SECRETS = [
    "hf_" + "aB3" * 12,
    "sk-proj-" + "x1" * 20,
    "ghp_" + "Z9" * 18,
    "github_pat_" + "a1" * 20,
    "AKIA" + "ABCD1234" * 2,
]


@pytest.mark.parametrize("secret", [*SECRETS, "https://me:pass@host/data"])
def test_a_secret_is_refused_and_not_repeated(secret, tmp_path, monkeypatch, capsys):
    lost = "me:pass" if "://" in secret else secret
    file = tmp_path / "c.json"
    file.write_text(json.dumps({"attn_implementation": secret}))
    for words in (
        ["--attn_implementation", secret],
        ["--sft_data", "a", secret],
        ["--seed", secret],
        ["--dtype", secret],
        ["--hf_token", secret],
        ["--config", str(file)],
    ):
        monkeypatch.setattr(sys, "argv", ["main.py", *NEEDED, *words])
        with pytest.raises(SystemExit) as caught:
            command_line.parse(SFTConfig, "")
        told = "".join(capsys.readouterr())
        assert caught.value.code == 2 and lost not in told and "main.py" in told
    assert lost not in hidden(f"a line with {secret} in it")


def test_names_that_only_look_like_secrets_are_taken():
    for word in ("hf_hub", "sk-learn", "a/b:train", "http://host/x", "user@host", "output/ghp_1"):
        assert hidden(word) == word
        assert command_line.build(SFTConfig, [*NEEDED, "--sft_data", word], 1).sft_data == [word]


def test_the_environment_is_not_saved(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRETS[0])
    config = command_line.build(SFTConfig, NEEDED, 1)
    command_line.save(config, tmp_path, 1)
    assert SECRETS[0] not in (tmp_path / "config.yaml").read_text()
