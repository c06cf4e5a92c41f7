"""What a judge reads and how it answers: profiles that give nothing away, templates, letters against the model's own forward
pass, answers as text, and validation against users' own choices by hand."""

import configparser
import hashlib
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import prlhf
from prlhf.backbone.toys import byte_tokenizer
from prlhf.data.comparisons import Comparison
from prlhf.data.sets import prism
from prlhf.data.sets.raw import Options
from prlhf.errors import UserError
from prlhf.judge import __main__ as command
from prlhf.judge.judges import Judge, find_judge
from prlhf.judge.letters import letter_log_probs, load_local
from prlhf.judge.pairs import Pair
from prlhf.judge.profiles import read_profiles
from prlhf.judge.prompting import Prompting, rulings_by_letters
from prlhf.judge.queries import Query, Ruling
from prlhf.judge.report import judgement
from prlhf.judge.template import DEFAULT_TEMPLATE, parse_answer, read_template
from prlhf.judge.validation import as_another, validation
from prlhf.judge.verdicts import Decision, decide

ROOT = Path(__file__).resolve().parent.parent


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def record(prompt, user="u", chosen="yes", rejected="no", **more):
    return {"prompt": prompt, "user": user, "chosen": chosen, "rejected": rejected, **more}


def query(prompt, user="u", user_text=None, first="one", second="two"):
    return Query(prompt, user, user_text, None, first, second, "here")


def read(conversations):
    return [messages[0]["content"] for messages in conversations]


def test_a_profile_by_hand(tmp_path):
    """The latest text and statements, each once; the query's own text where the file has none; attributes where it has no text."""
    records = [
        record("a", user_text="old", reason="too long", aspects="style"),
        record("b", user_text="new", reason="too long"),
        *(record(f"c{i}", reason=f"reason {i}") for i in range(3)),
        record("d", "v", attributes={"preference": "Be brief.", "age": "30"}),
        record("e", "w"),
        record("f", None, user_text="nobody's", reason="nobody's"),
        record("h", "\u00e9", user_text="accented"),
        record("g", "x", chosen="same", rejected="same", user_text="of no choice"),
    ]
    path = write(tmp_path / "p", records)
    profiles = read_profiles(path, 0)
    assert profiles.of(query("z", "u", "asked"))[:2] == (
        "new",
        ("What mattered: style", "reason 0", "reason 1", "reason 2"),
    )
    assert profiles.of(query("a")).reasons == (
        "too long",
        "reason 0",
        "reason 1",
        "reason 2",
    )  # b's; a's are of this prompt
    assert profiles.of(query("c2")).reasons == ("too long", "What mattered: style", "reason 0", "reason 1")
    assert profiles.of(query("z", "v", "asked")).text == "preference: Be brief.\nage: 30"
    assert profiles.of(query("z", "w", "asked")) == ("asked", (), ())
    assert profiles.of(query("z", "e\u0301")).text == "accented"  # as a run of an earlier version may name them
    assert (
        profiles.of(query("z", None)).empty
        and profiles.of(query("z", "x")).empty
        and profiles.of(query("z", "new")).empty
    )
    assert read_profiles(path, 0, with_text=False).of(query("z", "u", "asked")).empty
    assert read_profiles(path, 4, with_text=False).of(query("d", "v", "asked")).empty
    with pytest.raises(UserError, match="p, line 1, reason: expected text or null, found 3"):
        read_profiles(write(tmp_path / "p", [record("a", reason=3)]))


def test_examples_never_tell_what_is_judged(tmp_path):
    """Over seeds: of the user alone, as many as asked for or all there are, none of the prompt, dialogue or pair that is judged."""
    turn = [
        {"role": "user", "content": "d0"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "more"},
    ]
    dialogue = [record(turn[:1]), record(turn)]
    records = [record(f"p{i}", "uv"[i % 2], chosen=f"c{i}", rejected=f"r{i}") for i in range(20)] + dialogue
    path = write(tmp_path / "p", records)
    seen, drawn = set(), set()
    for seed in range(20):
        profiles = read_profiles(path, 4, seed)
        for i in range(20):
            for asked in (
                query(f"p{i}", "u"),
                query(f" p{i}\n", "u"),
                query("new", "u", first=f"r{i}", second=f"c{i}"),
            ):
                examples = profiles.of(asked).examples
                assert profiles.of(asked._replace(first=asked.second, second=asked.first)).examples == examples
                assert len(examples) == 4 and f"c{i}" not in {c.chosen for c in examples}
                assert {c.user for c in examples} == {"u"}
                seen |= {c.chosen for c in examples}
        for prompt in (tuple(turn[:1]), tuple(turn), "d0"):  # a later turn has the chosen answer of the first
            assert "yes" not in {c.chosen for c in read_profiles(path, 99, seed).of(query(prompt)).examples}
        drawn.add(tuple(c.id for c in profiles.of(query("new")).examples))
        assert profiles == read_profiles(path, 4, seed)
        assert len(read_profiles(path, 99, seed).of(query("new", "v")).examples) == 10
        assert not read_profiles(path, 0, seed).of(query("new")).examples
    assert seen == {"yes", *(f"c{i}" for i in range(0, 20, 2))} and len(drawn) > 10


def test_a_dialogue_as_text_never_tells_its_later_turns(tmp_path):
    """Nor its earlier ones, nor what was said of them, with other white space too; another dialogue's turns are told."""
    turns = ["Human: Hi\n\nAssistant:", "Human: Hi\n\nAssistant: secret\n\nHuman: More\n\nAssistant:"]
    records = [record(turn, reason=f"of turn {i}", chosen=f"c{i}") for i, turn in enumerate(turns)]
    records.append(record("Human: Bye\n\nAssistant:", reason="of another", chosen="c2"))
    profiles = read_profiles(write(tmp_path / "p", records), 9)
    for asked in (*turns, f" {turns[0]}\n", turns[1].replace("\n\n", "\n")):
        found = profiles.of(query(asked))
        assert {c.chosen for c in found.examples} == {"c2"} and found.reasons == ("of another",)
    assert {c.chosen for c in profiles.of(query("Human: Bye\n\nAssistant:")).examples} == {"c0", "c1"}


def test_examples_are_of_distinct_prompts(tmp_path):
    """Of 8 comparisons of one prompt and one each of 3 others, examples name each prompt once; any response of it may be drawn."""
    records = [record("many", chosen="c", rejected=f"r{i}") for i in range(8)]
    path = write(tmp_path / "p", records + [record(f"one {i}", chosen=f"d{i}") for i in range(3)])
    first, of_many = [], set()
    for seed in range(200):
        examples = read_profiles(path, 9, seed).of(query("new")).examples
        assert sorted(c.prompt for c in examples) == ["many", "one 0", "one 1", "one 2"]
        first.append(examples[0].prompt)
        of_many |= {c.rejected for c in examples if c.prompt == "many"}
    assert len(of_many) == 8 and 25 < first.count("many") < 75  # 200 / 4 expected, not 200 * 8 / 11


def test_prism_says_why(tmp_path):
    """The raw conversations' open feedback, and the three aspects that were rated highest, are in the comparisons."""
    raw = tmp_path / "raw"
    raw.mkdir()
    for name in prism.FILES:
        (raw / name).write_text((ROOT / "tests/raw/prism" / name).read_text())
    lines = (raw / "conversations.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    first["open_feedback"] = "The first was short."
    first["choice_attributes"] = {
        "values": 10,
        "fluency": 90,
        "safety": 95,
        "creativity": None,
        "helpfulness": 90,
        "other": 100,
    }
    (raw / "conversations.jsonl").write_text("\n".join([json.dumps(first), *lines[1:]]) + "\n")
    found = [
        (r.get("reason"), r.get("aspects")) for r in prism.read(raw, Options()).records if r["id"].startswith("c0:")
    ]
    assert found == [("The first was short.", "safety, fluency, helpfulness")] * 3
    assert not any("reason" in r for r in prism.read(ROOT / "tests/raw/prism", Options()).records)  # EMPTY STRING


def test_the_default_template_by_hand(tmp_path):
    """With nothing known, and with all; what looks like a placeholder is text; messages have their roles."""
    asked = query("What is {{ rain }} {prompt}?", first="{{ response_b }} {% if x %}", second="<b>&amp; {0}")
    alone = read(Prompting().conversations([asked]))[0]
    assert alone == (
        "You play a user of an AI assistant, and say which of two responses this user prefers.\n\n"
        "Now the user is asked to choose.\n\n[Prompt]\nWhat is {{ rain }} {prompt}?\n[Response A]\n{{ response_b }} {% if x %}\n"
        "[Response B]\n<b>&amp; {0}\n\nWhich response does the user prefer?\nAnswer with A or B alone."
    )
    told = [
        {"role": "system", "content": "Be brief."},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]},
    ]
    path = write(
        tmp_path / "p", [record(told, user_text="Likes {tea}.", reason="{{ why }}", chosen="c {%", rejected="r }}")]
    )
    whole = read(Prompting(profiles=read_profiles(path), asked=True).conversations([asked]))[0]
    assert whole == (
        "You play a user of an AI assistant, and say which of two responses this user prefers.\n\n"
        "What is known about the user:\nLikes {tea}.\n\nWhat the user said about other answers:\n- {{ why }}\n\n"
        'Earlier choices of this user:\n\n[Prompt]\nsystem: Be brief.\n\nassistant:\ntool_calls: [{"name": "f"}]\n'
        "[The response that the user preferred]\nc {%\n[The response that the user did not prefer]\nr }}\n\n"
        "Now the user is asked to choose.\n\n[Prompt]\nWhat is {{ rain }} {prompt}?\n[Response A]\n{{ response_b }} {% if x %}\n"
        "[Response B]\n<b>&amp; {0}\n\nWhich response does this user prefer?\n"
        "Answer with the letter A or B, then with how certain you are, a number from 1 to 100, as in: A, 70"
    )
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    shipped = setup["options.package_data"]["prlhf"].split()
    assert DEFAULT_TEMPLATE.relative_to(ROOT / "prlhf").as_posix() in shipped and DEFAULT_TEMPLATE.is_file()


def test_templates_are_refused_by_name_and_line(tmp_path):
    path, good = tmp_path / "t", "{{ prompt }}\n{{ response_a }}\n{{ response_b }}\n"
    cases = {
        good + "{{ user_txt }}": "t, line 4: no placeholder 'user_txt' (did you mean 'user_text'?); expected prompt, ",
        good + "{% for e in examples %}\n{{ e.choosen }}{% endfor %}": "line 5: no placeholder 'choosen' (did you mean 'chosen'?)",
        "{{ prompt }} {{ response_a }}": "t: no placeholder 'response_b' in it",
        good + "\n{% if prompt %}": "line 5: not a Jinja template",
        good + "{{ prompt | nothing }}": "line 4: not a Jinja template",
        good + "{{ prompt / 2 }}": "t: cannot be filled in",
        good + "{{ prompt.__class__ }}": "line 4: no placeholder '__class__'",
        good + "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "t: cannot be filled in",
    }  # fmt: skip
    for text, message in cases.items():
        path.write_text(text)
        with pytest.raises(UserError) as refused:
            read_template(path)
        assert message in str(refused.value) and "\n" not in str(refused.value), refused.value
    path.write_text(good + "{% for e in examples %}{{ loop.index }} {{ e.chosen }}{% endfor %}")
    assert read_template(path).text == path.read_text()
    with pytest.raises(UserError, match="no placeholder 'certainty' in it.*--certainty asks for"):
        read_template(path, certainty=True)


ANSWERS = {
    "A": ("first", None), " b.\n": ("second", None), "Answer: B": ("second", None), "[[A]]": ("first", None), "**B**": ("second", None),
    "(A)": ("first", None), "tie": ("tie", None), "It is a tie.": ("tie", None), "A tie": ("tie", None), "A, 85": ("first", 85),
    "B (80%)": ("second", 80), "Response A is better. Certainty: 90/100": ("first", 90), "a 7": ("first", 7),
    "A better answer is B": ("second", None), "Response A's": ("first", None), "B\n\nCertainty: 100": ("second", 100),
    "": ("unparsed", None), "A and B": ("unparsed", None), "A or B?": ("unparsed", None), "C": ("unparsed", None),
    "A clear answer is hard": ("unparsed", None), "A tie between A and B": ("unparsed", None), "I prefer not to say A": ("unparsed", None),
    "It isn't B": ("unparsed", None), "<html>": ("unparsed", None), "AB": ("unparsed", None), "85": ("unparsed", 85),
    "A, 0": ("first", None), "A, 101": ("first", None), "A, 80 to 90": ("first", None), "A, 80.5": ("first", None),
    "A 99999999999999999999": ("first", None), "A wins": ("first", None), "Response A wins.": ("first", None),
    "option a": ("first", None), "Option b": ("second", None), "Response A clearly wins": ("first", None), "option a wins": ("first", None),
    "Vitamin B helps so it is the first one": ("unparsed", None), "A, the first one": ("first", None), "B: the second": ("second", None),
    "A, not the second": ("unparsed", None), "A response a friend likes": ("unparsed", None), "Response A and option b": ("unparsed", None),
}  # fmt: skip


@pytest.mark.parametrize("text", ANSWERS)
def test_answers_as_text(text):
    assert parse_answer(text) == ANSWERS[text]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A random Llama with weights large enough that the letters differ, and the byte tokenizer, as a model's folder."""
    folder, tokenizer = tmp_path_factory.mktemp("model") / "llama", byte_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=64, max_position_embeddings=2048, initializer_range=0.7, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def own_log_probs(folder, text):
    """ln p of the bytes A and B behind the chat template's text, by Hugging Face's forward pass in float64 of this text alone."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).double(), byte_tokenizer()
    ids = tokenizer(f"user: {text}\nassistant:", add_special_tokens=False)["input_ids"]
    letters = tokenizer.convert_tokens_to_ids(["A", "B"])
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[letters]


def test_letters_are_those_of_the_models_own_forward_pass(model_folder):
    """Of texts of unequal lengths, in batches; to the bit the same in another order, repeated, and in a part that fills a batch."""
    texts = ["word " * (7 * i % 23 + 1) + str(i) for i in range(19)]
    local = load_local(str(model_folder))
    conversations = [({"role": "user", "content": text},) for text in texts]
    found = letter_log_probs(*local, conversations)
    expected = torch.stack([own_log_probs(model_folder, text) for text in texts])
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    assert (expected[:, 0] > expected[:, 1]).unique().numel() == 2 and found.dtype == torch.float32
    order = random.Random(0).sample(range(19), 19)
    again = letter_log_probs(*local, [conversations[i] for i in [*order, *order]])
    assert torch.equal(again, found[[*order, *order]])


def test_a_local_model_judges_by_its_letters(model_folder, call, tmp_path):
    """The command's verdicts and certainties in both orders, from its own forward pass; antisymmetric; equal systems 1/2."""
    rng = random.Random(1)
    rows = [(f"Q{i}", "uv"[i % 2], *("ha" * rng.randrange(1, 9) + rng.choice("xyz") for _ in "ab")) for i in range(10)]
    profiles = write(
        tmp_path / "p", [record(f"P{i}", "uv"[i % 2], f"c{i}", f"r{i}", user_text=f"user {i % 2}") for i in range(6)]
    )
    for side, name in enumerate("ab", start=2):
        write(
            tmp_path / name, [{"id": row[0], "user": row[1], "prompt": row[0], "response": row[side]} for row in rows]
        )

    def judged(a, b, out, *more):
        judge = ("--judge", f"hf:{model_folder}", "--profiles", profiles, "--examples", 2, "--out", tmp_path / out)
        status, said, err = call(command.main, tmp_path / a, tmp_path / b, *judge, *more)
        assert status == 0, err
        lines = (tmp_path / out / "verdicts.jsonl").read_text().splitlines()
        return json.loads((tmp_path / out / "report.json").read_text()), [json.loads(line) for line in lines], said

    report, lines, said = judged("a", "b", "ab", "--certainty")
    prompting = Prompting(profiles=read_profiles(profiles, 2))
    expected, certain = [], []
    for prompt, user, y1, y2 in rows:
        both = []
        for first, second in ((y1, y2), (y2, y1)):
            (text,) = read(prompting.conversations([query(prompt, user, None, first, second)]))
            assert f"user {'uv'.index(user)}" in text and text.count("[Prompt]") == 3
            a, b = own_log_probs(model_folder, text).exp().tolist()
            assert abs(math.log(a / b)) > 1e-4  # beyond rounding
            both.append(("first" if a > b else "second", 100 * max(a, b) / (a + b)))
        expected.append([verdict for verdict, _ in both])
        certain.append([certainty for _, certainty in both])
    assert [[line["a_first"], line["b_first"]] for line in lines] == expected
    assert np.array([line["certainties"] for line in lines]) == pytest.approx(np.array(certain), rel=1e-4)
    assert len(set(map(tuple, expected))) > 1
    sure = [line["win"] for line, both in zip(lines, certain) if min(both) >= 80]
    assert report["certain"]["pairs"] == len(sure) and report["certain"]["stated"] == 10
    assert report["certain"]["win_rate"] == (sum(sure) / len(sure) if sure else None)
    assert f"Among the {len(sure)} pairs" in said and "up to 2 of their comparisons" in said
    back, plain, _ = judged("b", "a", "ba")
    assert back["win_rate"]["per_sample"] == pytest.approx(1 - report["win_rate"]["per_sample"], abs=1e-12)
    assert "certain" not in back and "certainties" not in plain[0]
    assert judged("a", "a", "aa")[0]["win_rate"]["per_sample"] == 0.5


def test_the_report_says_of_whom_the_judge_knows_anything(model_folder, call, tmp_path):
    """Of u from the profiles and of w by the responses' text, not of v; profiles of nobody asked and templates without users are refused."""
    asked = [{"id": u, "user": u, "prompt": f"Q{u}", "user_text": {"w": "Be brief."}.get(u)} for u in "uvw"]
    a, b = (write(tmp_path / y, [{**r, "response": y} for r in asked]) for y in ("one", "other"))
    judge = (a, b, "--judge", f"hf:{model_folder}", "--out", tmp_path / "out")
    stranger = write(tmp_path / "stranger", [record("P", "x", user_text="unlike")])
    (tmp_path / "t").write_text("{{ prompt }} {{ response_a }} {{ response_b }}")
    cases = {
        ("--profiles", stranger): f"--profiles {stranger}: tells nothing of any of the 3 users, expected one at least",
        (
            "--profiles",
            stranger,
            "--template",
            tmp_path / "t",
        ): "t: tells nothing of users, expected user_text, reasons",
    }
    for more, message in cases.items():
        status, _, err = call(command.main, *judge, *more)
        assert status == 2 and message in err and not (tmp_path / "out").exists(), err
    status, said, err = call(command.main, *judge, "--profiles", write(tmp_path / "p", [record("P", "u")]))
    assert status == 0 and "It knows anything of 2 of 3 users." in said, err
    status, said, err = call(command.main, a, b, *judge[2:4], "--out", tmp_path / "plain")
    assert status == 0 and "It knows anything of 1 of 3 users." in said, err


def test_letters_that_are_equally_likely_are_a_tie(model_folder):
    local = load_local(str(model_folder))
    with torch.no_grad():
        head = local.model.backbone.get_output_embeddings().weight
        a, b = local.tokenizer.convert_tokens_to_ids(["A", "B"])
        head[a] = head[b]
    assert rulings_by_letters(local, Prompting(certainty=True), [query("x"), query("y")]) == [Ruling("tie", 50.0)] * 2


def test_a_model_that_cannot_answer_is_refused(model_folder):
    local = load_local(str(model_folder))
    with pytest.raises(UserError, match="there: a question of 3.* tokens is more than the model reads.*fewer examples"):
        letter_log_probs(*local, [({"role": "user", "content": "w" * 3000},)], ["there"])
    inner = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "user:": 2, "w": 3, "assistant:": 4}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")
    words.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ' ' }}{% endfor %}{{ 'assistant: ' }}"
    )
    with pytest.raises(UserError, match="does not write A and B as one token each"):
        letter_log_probs(local.model, words, [({"role": "user", "content": "w"},)])


def test_the_win_rate_among_the_certain_by_hand():
    """Both certainties of at least 80: a win, a loss, a win of another user and a tie; not 79, not one unsaid, not unparsed."""
    pairs = [Pair("", "x", user, None, None, "y", "z", "") for user in "aabbaaaa"]
    win, loss = ("first", "second"), ("second", "first")
    decisions = [
        Decision(*win, (80, 100)), Decision(*loss, (90, 90)), Decision(*win, (95, 80)), Decision("first", "first", (99, 99)),
        Decision(*win, (79, 100)), Decision(*win, (None, 100)), Decision("unparsed", "first", (100, 100)), Decision(*win),
    ]  # fmt: skip
    found = judgement(pairs, decisions)["certain"]
    assert (found["at_least"], found["pairs"], found["stated"], found["win_rate"]) == (80, 4, 5, 2.5 / 4)
    assert "certain" not in judgement(pairs[:1], [Decision(*win)])
    judge = Judge("j", lambda queries: [Ruling("first", 90), "tie"] if queries else [])
    assert decide(pairs[:1], judge) == [Decision("first", "tie", (90, None))]


def comparisons_of(users, n):
    """n comparisons of each user, the chosen response marked by its user's own letter, the rejected one by another's."""
    return [
        Comparison(f"p{i}", f"{user} chosen {'w ' * (i % 3)}", f"other {i} w", user, None, f"{user}{i}")
        for user in users
        for i in range(n)
    ]


def mind_reader(right, knows=lambda q: q.user is not None):
    """A judge who picks the response that names the user, for `right` of them; else always the first."""

    def verdicts(queries):
        found = []
        for q in queries:
            named = [y.startswith(f"{q.user} ") for y in (q.first, q.second)]
            found.append("first" if q.user not in list(right) or not any(named) else "first" if named[0] else "second")
        return found

    return Judge("mind", verdicts, knows=knows)


def test_validation_by_hand():
    """The judge reads three of four users' minds: 3/4 + 1/4 * 1/2. Generic, and as another, it follows the position: 1/2.

    Of 3 words against 2, 3, 4 and 2 the chosen response is shorter in two pairs, and as long in one.
    """
    found = validation(comparisons_of("abcd", 4), mind_reader("abc"))
    assert {name: rate["per_sample"] for name, rate in found["agreement"].items()} == {
        "judge": 3.5 / 4, "generic": 0.5, "another": 0.5, "rule:shorter": 2.5 / 4, "rule:longer": 1.5 / 4,
    }  # fmt: skip
    assert found["agreement"]["judge"]["per_sample"] == found["agreement"]["judge"]["per_user"] == 3.5 / 4
    for name in ("generic", "another"):
        assert found["agreement"][name]["per_sample"] == 0.5 and found["agreement"][name]["ties"] == 16
        assert found["differences"][name]["per_sample"] == pytest.approx(3 / 8)
        assert found["differences"][name]["pairs"] == 16
    assert {user: (row["n"], row["judge"], row["another"]) for user, row in found["per_user"].items()} == {
        **{user: (4, 1, 0.5) for user in "abc"}, "d": (4, 0.5, 0.5)
    }  # fmt: skip
    many = validation(comparisons_of("abcdefghijkl", 4), mind_reader("abcdefghijkl"))
    assert many["personal"] and "is a personal judge" in many["sentence"]
    assert not found["personal"]  # of four users three may be chance
    assert "is no personal judge: it is not shown to agree more often than the same judge" in found["sentence"]


def test_the_other_user_is_never_oneself():
    """A circle through all users, by the seed; with the other's latest text, or none."""
    queries = [
        query(f"p{i}", user, text) for i, (user, text) in enumerate([*zip("abcde", "ABCD"), ("a", "A2"), ("e", None)])
    ]
    circles = set()
    for seed in range(30):
        found = as_another(queries, seed)
        other = {q.user: f.user for q, f in zip(queries, found)}
        assert all(user != own for user, own in other.items()) and sorted(other.values()) == [*"abcde"]
        texts = {"a": "A2", "b": "B", "c": "C", "d": "D", "e": None}
        assert all(f == q._replace(user=other[q.user], user_text=texts[other[q.user]]) for q, f in zip(queries, found))
        circles.add(tuple(other.items()))
        assert as_another(queries, seed) == found
    assert len(circles) > 10


def test_a_judge_that_knows_nobody_is_compared_with_rules_alone():
    """And says so; users it does not know are left out where it knows others; of a single one there is no other."""
    comparisons = comparisons_of("abc", 2) + [Comparison("x", "y", "z", None, None, "")]
    nobody = validation(comparisons, find_judge("rule:longer", []))
    assert list(nobody["agreement"]) == ["judge", "rule:shorter"] and not nobody["personal"]
    assert nobody["left_out"] == {"without a user": 1, "of users not known": 0}
    assert "rule:longer reads nothing of any user here" in nobody["sentence"]
    some = validation(comparisons, mind_reader("ab", lambda q: q.user in ("a", "b")))
    assert (
        some["comparisons"] == 4 and set(some["per_user"]) == {"a", "b"} and some["left_out"]["of users not known"] == 2
    )
    one = validation(comparisons, mind_reader("a", lambda q: q.user == "a"))
    assert "another" not in one["agreement"] and not one["personal"] and "knows of one user alone" in one["sentence"]
    with pytest.raises(UserError, match="no comparison with a user"):
        validation(comparisons[-1:], mind_reader("a"))


def test_controls_are_asked_without_the_user_and_as_another():
    """Each choice in both orders: as its user with their text, with neither, and as the other with the other's text."""
    asked = []

    def verdicts(queries):
        asked.extend((q.user, q.user_text, q.first) for q in queries)
        return ["first"] * len(queries)

    both = [Comparison("x", f"{u}1", f"{u}2", u, u.upper(), "") for u in "ab"]
    validation(both, Judge("j", verdicts, knows=lambda q: q.user is not None))
    own = [(u, u.upper(), f"{u}{i}") for i in (1, 2) for u in "ab"]
    other = [(v, v.upper(), f"{u}{i}") for i in (1, 2) for u, v in ("ab", "ba")]
    assert asked == [*own, *[(None, None, first) for _, _, first in own], *other]


def test_unparsed_verdicts_count_nowhere_else():
    """Of two users' two pairs the judge's answer on one of b's is nonsense: 3/3 of what it parsed."""
    own = mind_reader("ab")

    def verdicts(queries):
        nonsense = [q.user == "b" and q.prompt == "p1" for q in queries]
        return ["unparsed" if bad else verdict for bad, verdict in zip(nonsense, own.verdicts(queries))]

    found = validation(comparisons_of("ab", 2), own._replace(verdicts=verdicts))
    rate, generic = found["agreement"]["judge"], found["differences"]["generic"]
    assert (rate["per_sample"], rate["unparsed"], generic["pairs"], generic["per_sample"]) == (1, 1, 3, 0.5)


def test_a_reward_model_is_validated_by_other_users_vectors(low_rank, call, tmp_path):
    """Own, user 0 and another known user's margins, by `prlhf.load(...).margins`; a new user is left out."""
    model = prlhf.load(low_rank)
    torch.manual_seed(0)
    lines = [json.loads(line) for line in (ROOT / "examples/tiny/valid.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["user"] in model.users]
    assert len({line["user"] for line in lines}) > 1
    data = write(tmp_path / "data", [*lines, record("x", "stranger")])
    judge = ("--judge", f"prm:{low_rank}", "--seed", 3)
    status, said, err = call(command.main, "--validate", data, *judge, "--out", tmp_path / "out")
    assert status == 0, err
    found = json.loads((tmp_path / "out/validation.json").read_text())
    queries = [query(line["prompt"], line["user"]) for line in lines]
    others = [q.user for q in as_another(queries, 3)]

    def agreement(users):
        margins = np.array(model.margins([{**line, "user": user} for line, user in zip(lines, users)]))
        assert np.abs(margins).min() > 1e-6
        return (margins > 0).mean()

    own = agreement([line["user"] for line in lines])
    expected = {"judge": own, "generic": agreement([None] * len(lines)), "another": agreement(others)}
    assert {name: found["agreement"][name]["per_sample"] for name in expected} == pytest.approx(expected)
    assert len(set(expected.values())) > 1
    assert found["differences"]["another"]["per_sample"] == pytest.approx(own - expected["another"])
    assert found["comparisons"] == len(lines) and found["left_out"]["of users not known"] == 1
    assert found["sentence"] in said and "of users not known" in said


@pytest.fixture
def files(tmp_path):
    """Responses of two systems, profiles and held-out comparisons."""
    for name in "ab":
        write(
            tmp_path / name, [{"id": str(i), "user": "u", "prompt": f"Q{i}", "response": name * i} for i in range(1, 4)]
        )
    write(tmp_path / "p", [record(f"P{i}", "uv"[i % 2], f"c{i}", f"r{i}") for i in range(6)])
    write(tmp_path / "held", [record(f"H{i}", "uv"[i % 2], f"c{i}", f"r{i}") for i in range(6)])
    return tmp_path


def test_the_report_quotes_the_validation_of_the_same_judge_alone(files, model_folder, call):
    hf = ("--judge", f"hf:{model_folder}")
    read_it = ("--profiles", files / "p", "--examples", 1)
    assert call(command.main, "--validate", files / "held", *hf, *read_it, "--out", files / "v")[0] == 0
    found = json.loads((files / "v/validation.json").read_text())
    pairs = (files / "a", files / "b", "--validation", files / "v")
    status, said, err = call(command.main, *pairs, *hf, *read_it, "--out", files / "out")
    assert status == 0, err
    assert found["sentence"] in said and "Validated on 6 choices of 2 users" in said
    quoted = json.loads((files / "out/report.json").read_text())["validation"]
    assert quoted["agreement"] == found["agreement"] and quoted["folder"] == str(files / "v")
    assert (
        call(command.main, "--validate", files / "held", *hf, *read_it, "--out", files / "v")[0] == 0
    )  # the same again
    (files / "v2").mkdir()
    (files / "v2/validation.json").write_text("{}")
    cases = {
        (*pairs, "--judge", "rule:longer"): "found a validation of hf:",
        (
            *pairs,
            *hf,
            "--profiles",
            files / "p",
            "--examples",
            2,
        ): "found the same judge with other settings (examples)",
        (*pairs, *hf, *read_it, "--no-text"): "other settings (text)",
        (*pairs[:3], files / "nowhere", *hf): "nowhere: no validation.json that can be read",
        (*pairs[:3], files / "v2", *hf): "v2/validation.json: no agreement, ",
    }
    for arguments, message in cases.items():
        status, _, err = call(command.main, *arguments, "--out", files / "new")
        assert status == 2 and message in err and len(err.splitlines()) == 1, err
        assert not (files / "new").exists()


def test_a_validation_of_other_weights_is_not_quoted(files, call):
    """simulated:FILE is known by the SHA-256 of FILE, which sha256sum prints: other choices in the same place, another judge."""
    rules = [record("x", user, "one", "one two") for user in "uv"]
    judge = ("--judge", f"simulated:{write(files / 'rules', rules)}")
    before = hashlib.sha256((files / "rules").read_bytes()).hexdigest()
    assert call(command.main, "--validate", files / "held", *judge, "--out", files / "v")[0] == 0
    assert json.loads((files / "v/validation.json").read_text())["version"] == before
    quote = (files / "a", files / "b", *judge, "--validation", files / "v", "--out")
    assert call(command.main, *quote, files / "out")[0] == 0
    write(files / "rules", [{**line, "prompt": "y"} for line in rules])
    after = hashlib.sha256((files / "rules").read_bytes()).hexdigest()
    status, _, err = call(command.main, *quote, files / "new")
    assert status == 2 and f"({before}: its weights, " in err and f"expected the present one ({after})" in err
    assert len(err.splitlines()) == 1 and not (files / "new").exists()


def test_show_asks_nothing_and_needs_no_model(files, call):
    nowhere = ("--judge", "hf:/nowhere/at/all", "--profiles", files / "p", "--show", "--out", files / "out")
    status, said, err = call(command.main, files / "a", files / "b", *nowhere)
    assert status == 0, err
    assert "[Response A]\na\n[Response B]\nb\n" in said and said.count("[Prompt]") == 1 + 3
    status, said, _ = call(command.main, "--validate", files / "held", *nowhere, "--examples", 1)
    assert status == 0 and "[Response A]\nc0\n[Response B]\nr0\n" in said and said.count("[Prompt]") == 2
    assert not (files / "out").exists()


def test_bad_options_are_refused_and_nothing_is_written(files, model_folder, call):
    a, b, held, p = (files / name for name in ("a", "b", "held", "p"))
    rule, hf = ("--judge", "rule:longer"), ("--judge", f"hf:{model_folder}")
    (files / "t").write_text("{{ prompt }} {{ response_a }} {{ response }}")
    write(files / "nobody", [record("x", None)])
    (files / "full").mkdir()
    (files / "full/x").write_text("x")
    before = {path: path.read_bytes() for path in files.rglob("*") if path.is_file()}
    cases = {
        (a, *rule): "found 1 files, expected two of responses at least, or --validate FILE",
        (a, b, "--validate", held, *rule): "found 2 files, expected none beside --validate",
        (a, b, *rule, "--limit", 3): "--limit: only with --validate",
        ("--validate", held, *rule, "--validation", files): "--validation: not with --validate",
        ("--validate", held, *rule, "--limit", 0): "--limit: found 0, expected at least 1",
        (a, b, *rule, "--profiles", p): "--profiles: not for --judge rule:longer, expected hf:... or openai:...",
        (a, b, *rule, "--no-text"): "--no-text: not for --judge rule:longer",
        (a, b, *hf, "--examples", 2): "--examples: found without --profiles",
        (a, b, *hf, "--profiles", p, "--examples", -1): "--examples: found -1, expected at least 0",
        (a, b, *hf, "--profiles", files / "missing"): "no such file",
        (a, b, *hf, "--template", files / "t"): "t, line 1: no placeholder 'response'",
        (a, b, "--judge", "hf:"): "--judge hf:: no such judge",
        (a, b, "--judge", "hf:/nowhere/at/all"): "expected a folder or hub name",
        ("--validate", files / "nobody", *rule): "no comparison with a user",
        ("--validate", held, *rule, "--out", files / "full"): "full: holds something else ('x')",
        ("--validate", held, *rule, "--out", a): "found a file, expected a new",
    }  # fmt: skip
    for arguments, message in cases.items():
        out = () if "--out" in arguments else ("--out", files / "new")
        status, _, err = call(command.main, *arguments, *out)
        assert status == 2 and message in err and len(err.splitlines()) == 1, (arguments, err)
        assert {path: path.read_bytes() for path in files.rglob("*") if path.is_file()} == before
        assert not (files / "new").exists()
    assert call(command.main, "--validate", held, *rule, "--out", files / "v")[0] == 0
    status, _, err = call(command.main, "--validate", held, *rule, "--limit", 2, "--out", files / "v")
    assert status == 2 and "which differs in limit" in err
