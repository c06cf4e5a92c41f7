import itertools
import json
import random

import pytest
from helpers import TOKENIZER, tiny_config, tiny_model
from tokenizers import processors

from prlhf.backbone.toys import byte_tokenizer
from prlhf.batch.datasets import encode_file
from prlhf.batch.order import even_micro_batches, micro_batches, updates_of_epoch
from prlhf.batch.tokens import EncodedComparison, Encoder, EncodingReport
from prlhf.batch.trees import PACK_MULTIPLE
from prlhf.data.comparisons import ComparisonFile, parse_comparison, read_comparisons
from prlhf.data.users import UserIndex
from prlhf.errors import UserError
from prlhf.score.task import Task
from prlhf.train.plan import plan_update


def with_bos():
    """A tokenizer that, like Llama's, begins every text with BOS."""
    tokenizer = byte_tokenizer()
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.chat_template = "<s>" + tokenizer.chat_template  # and whose template says it too
    return tokenizer


def encoder(*overrides, tokenizer=TOKENIZER, place="before_prompt"):
    return Encoder(tokenizer, tiny_config(*overrides).data, place=place)


def comparison(prompt="What is rain?", chosen="water", rejected="no", **more):
    return parse_comparison({"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}, "f", "i")


def encode(enc, c):
    report = EncodingReport()
    return enc.encode(c, UserIndex(["u"]), report), report


def ids(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def test_a_comparison_by_hand():
    found, report = encode(encoder(), comparison(user="u", user_text="old"))
    assert found.prefix == ids("old\nWhat is rain?")  # this tokenizer puts no BOS
    assert (found.chosen, found.rejected, found.user) == (ids("water") + [2], ids("no") + [2], 1)
    assert found.reference_prefix == found.prefix
    assert report.comparisons == 1 and report.tokens == found.length == 4 + 13 + 6 + 3


def test_bos_once_before_user_text_whether_or_not_the_template_says_it():
    enc = encoder(tokenizer=with_bos())
    assert enc.bos == [1] and encoder().bos == []
    assert encode(enc, comparison(user_text="old"))[0].prefix == [1, *ids("old\nWhat is rain?")]
    chat = encode(enc, comparison(prompt=[{"role": "user", "content": "hi"}]))[0].prefix
    assert chat == [1, *ids("user: hi\nassistant:")]


def test_messages_equal_the_tokenizers_own_template():
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}]
    own = TOKENIZER.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert encoder().read(tuple(messages), "f").ids == own
    assert encoder("data.template=chat").read("hi", "f").ids == ids("user: hi\nassistant:")
    assert encoder().read("hi", "f").ids == ids("hi")


LLAMA3 = (  # as Llama-3-Instruct's tokenizer_config.json has it
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def llama3_tokenizer():
    """Bytes, with Llama 3's special tokens, its template, and a BOS before every text."""
    tokenizer = byte_tokenizer()
    specials = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    tokenizer.add_special_tokens(
        {"bos_token": specials[0], "eos_token": specials[1], "additional_special_tokens": specials[2:]}
    )
    bos = (specials[0], tokenizer.bos_token_id)
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    tokenizer.chat_template = LLAMA3
    return tokenizer


@pytest.mark.parametrize("template", ["auto", "chat", "llama3"])
def test_llama_3_prompts_are_token_by_token_those_of_its_own_template(template):
    tokenizer = llama3_tokenizer()
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": " What is rain? "},
                {"role": "assistant", "content": "Water."}, {"role": "user", "content": "And snow?"}]  # fmt: skip
    own = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    enc = encoder(f"data.template={template}", tokenizer=tokenizer)
    found = encode(enc, comparison(prompt=messages))[0]
    assert found.prefix == own and own.count(tokenizer.bos_token_id) == 1
    assert found.chosen == [
        *tokenizer("water", add_special_tokens=False)["input_ids"],
        tokenizer.convert_tokens_to_ids("<|eot_id|>"),
    ]
    alone = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_dict=False
    )
    if template != "auto":
        assert encode(enc, comparison(prompt="hi"))[0].prefix == alone


def test_tulu_prompts_by_hand():
    enc = encoder("data.template=tulu", tokenizer=with_bos())
    assert encode(enc, comparison(prompt="hi"))[0].prefix == [1, *ids("<|user|>\nhi \n<|assistant|>\n")]
    talk = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    assert enc.read(tuple(talk), "f").ids == ids("<|user|>\na \n<|assistant|>\nb \n<|user|>\nc \n<|assistant|>\n")


def test_the_reference_sees_no_user_text_that_the_policy_does_not_see():
    for policy, reference in ((True, True), (True, False), (False, True), (False, False)):
        enc = encoder(f"data.user_text={policy}", f"data.user_text_in_reference={reference}")
        found = encode(enc, comparison(user_text="old"))[0]
        assert found.prefix == ids("old\nWhat is rain?" if policy else "What is rain?")
        assert found.reference_prefix == ids("old\nWhat is rain?" if policy and reference else "What is rain?")


def test_no_template_is_told():
    bare = byte_tokenizer()
    bare.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        encoder("data.template=chat", tokenizer=bare).read("hi", "f")


def test_a_tokenizer_with_named_chat_templates_takes_the_default_or_is_told():
    named = byte_tokenizer()
    named.chat_template = {"default": "{{ messages[0]['content'] }}!", "rag": "{{ documents }}"}
    assert encoder("data.template=chat", tokenizer=named).read("hi", "f").ids == ids("hi!")
    del named.chat_template["default"]
    named.chat_template["tool_use"] = "{{ tools }}"
    with pytest.raises(UserError, match="templates are 'rag', 'tool_use'; expected one that is named 'default'"):
        encoder("data.template=chat", tokenizer=named).read("hi", "f")
    assert encoder("data.template=tulu", tokenizer=named).read("hi", "f").ids == ids("<|user|>\nhi \n<|assistant|>\n")


def test_a_template_that_refuses_is_told_with_file_and_line_and_without_the_conversation(tmp_path):
    strict = byte_tokenizer()
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    path = tmp_path / "talks.jsonl"
    talk = [{"role": "user", "content": "a secret " * 9}, {"role": "user", "content": "again"}]
    records = [{"prompt": x, "chosen": "a", "rejected": "b", "id": "mine", "user": "u"} for x in ("plain", talk)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(UserError, match="talks.jsonl, line 2, prompt: .*roles must alternate.*user, user") as told:
        encode_file(read_comparisons(path), encoder(tokenizer=strict), UserIndex([]))
    assert "secret" not in str(told.value)
    strict.chat_template = "{{ 'user: ' + none }}"  # Python's own TypeError, as for a null content
    with pytest.raises(UserError, match="f, prompt: the chat template refuses"):
        encoder("data.template=chat", tokenizer=strict).read("hi", "f")


def test_the_template_is_told_the_configs_date_and_arguments_and_no_others():
    """As Llama 3.2's template asks: date_string where it is given, else strftime_now."""
    dated = byte_tokenizer()
    dated.chat_template = (
        "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}: {{ messages[0]['content'] }}"
    )
    day = ("data.template=chat", "data.template_date=2024-07-26")
    assert encoder(*day, tokenizer=dated).read("hi", "f").ids == ids("26 Jul 2024: hi")
    given = encoder(*day, "data.template_args={date_string: 1 May 1999}", tokenizer=dated)
    assert given.read("hi", "f").ids == ids("1 May 1999: hi")
    with pytest.raises(UserError, match="template_args: found 'date_strin', which the chat template does not read"):
        encoder(*day, "data.template_args={date_strin: x}", tokenizer=dated).read("hi", "f")
    with pytest.raises(UserError, match="template_args: found 'tools'"):
        encoder("data.template_args={tools: []}", tokenizer=dated)


def test_a_long_prompt_loses_its_oldest_text_and_keeps_its_end_and_eos():
    found, report = encode(encoder("data.max_prompt_tokens=20"), comparison(prompt="old " * 50 + "TL;DR:"))
    assert found.prefix == ids("old " * 50 + "TL;DR:")[-20:] and TOKENIZER.decode(found.prefix).endswith("TL;DR:")
    assert found.chosen[-1] == found.rejected[-1] == 2
    assert report.prompts_truncated == 1


def test_the_longer_response_takes_its_room_from_the_prompt():
    found, _ = encode(encoder("data.max_tokens=60"), comparison(prompt="x" * 50, rejected="y" * 30))
    assert len(found.prefix) == 60 - 31 and len(found.rejected) == 31


def test_too_long_responses_are_dropped_and_counted_never_cut():
    found, report = encode(encoder("data.max_tokens=60"), comparison(prompt="x" * 50, chosen="y" * 50))
    assert found is None and (report.too_long_dropped, report.comparisons) == (1, 0)
    short, _ = encode(encoder("data.max_tokens=60"), comparison(prompt="xy", chosen="y" * 50))
    assert short is not None  # a short prompt that fits whole is no reason to drop


def test_user_text_loses_its_end_and_can_be_kept_from_reference_or_from_both():
    c = comparison(user_text="abcdef")
    found, report = encode(encoder("data.max_user_text_tokens=3"), c)
    assert found.prefix == ids("abcWhat is rain?") and report.user_texts_truncated == 1
    found, _ = encode(encoder("data.user_text_in_reference=false"), c)
    assert found.prefix == ids("abcdef\nWhat is rain?") and found.reference_prefix == ids("What is rain?")
    found, _ = encode(encoder("data.user_text=false"), c)
    assert found.prefix == found.reference_prefix == ids("What is rain?")


TALK = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "assistant:"},
]


@pytest.mark.parametrize(
    "template, prompt, tail",
    [
        ("auto", "hi", ""),
        ("chat", "hi", "\nassistant:"),
        ("auto", TALK, "\nassistant:"),
        ("tulu", TALK, " \n<|assistant|>\n"),
        (
            "llama3",
            [{"role": "user", "content": " hi "}],
            "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        ("auto", [*TALK, {"role": "tool", "content": "3 mm"}], "\ntool: 3 mm\nassistant:"),
    ],
)
def test_the_tail_of_a_prompt_is_what_the_template_puts_behind_the_users_words(template, prompt, tail):
    """By hand. With the vectors before the prompt no tail is looked for, and the tokens are the same."""
    c, key = comparison(prompt=prompt, user_text="old"), f"data.template={template}"
    found, _ = encode(encoder(key, place="prompt_end", tokenizer=with_bos()), c)
    assert found.tail == len(ids(tail)) and found.prefix[len(found.prefix) - found.tail :] == ids(tail)
    before, _ = encode(encoder(key, tokenizer=with_bos()), c)
    assert before == found._replace(tail=0)


def test_a_users_message_without_words_has_its_tail():
    """A tool call may stand for the content."""
    call = {"function": {"name": "weather", "arguments": {}}}
    prompt = [{"role": "user", "content": None, "tool_calls": [call]}]
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.content or '' }}{{ m.tool_calls | length }}>{% endfor %}"
    read = encoder(tokenizer=tokenizer, place="prompt_end").read(prompt, "f.jsonl")
    assert (read.text, read.tail) == ("<1>", 2)


def test_a_long_prompt_loses_its_words_and_never_its_tail():
    """11 tokens of tail; a prompt of which nothing but the tail, or less, would be left is dropped."""
    c, keys = comparison(prompt="x" * 40), ("data.template=chat", "data.min_prompt_tokens=1")
    found, _ = encode(encoder(*keys, "data.max_prompt_tokens=12", place="prompt_end"), c)
    assert found.prefix == ids("x\nassistant:") and found.tail == 11
    for room in (11, 5):
        tight = encoder(*keys, f"data.max_prompt_tokens={room}", place="prompt_end")
        assert encode(tight, c)[0] is None
        with pytest.raises(UserError, match=f"f.jsonl: {room} tokens are left of the prompt .*expected at least 12$"):
            tight.prefix_to_answer(tight.read("x" * 40, "f.jsonl"), None, "f.jsonl")
    assert encode(encoder(*keys, "data.max_prompt_tokens=11"), c)[0].prefix == ids("\nassistant:")


@pytest.mark.parametrize(
    "source, messages, found",
    [
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}!", TALK, "content that the chat template changes"),
        ("{{ messages | length }}", TALK, "content that the chat template changes"),
        ("{% for m in messages %}{{ m.content[:3] }}{% endfor %}", TALK, "content that the chat template changes"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", [{"role": "system", "content": "a"}], "no user message"),
    ],
)
def test_where_users_have_no_place_behind_the_prompt_it_is_refused(source, messages, found):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = source
    with pytest.raises(UserError, match=f"f.jsonl, line 3, prompt: found {found}.*expected user_model.place"):
        encoder(tokenizer=tokenizer, place="prompt_end").read(messages, "f.jsonl, line 3")
    encoder(tokenizer=tokenizer).read(messages, "f.jsonl, line 3")


def test_nothing_fits_is_an_error_and_the_report_says_what_was_dropped():
    file = ComparisonFile([comparison(chosen="y" * 99)], equal_responses=4)
    with pytest.raises(UserError, match="data.max_tokens: found 30"):
        encode_file(file, encoder("data.max_tokens=30"), UserIndex([]))
    with pytest.raises(UserError, match="f.jsonl: 0 tokens are left of the prompt"):
        tight = encoder("data.max_tokens=10", "data.max_user_text_tokens=10")
        tight.prefix_to_answer(tight.read("hi", "f"), "a long text about me", "f.jsonl")
    data = encode_file(ComparisonFile([comparison()], 4), encoder(), UserIndex([]))
    assert "4 equal responses dropped" in data.report.lines()


def of_length(length, prompt):
    """A comparison of that many tokens; those of one prompt number have the same two responses."""
    return EncodedComparison([prompt], [prompt], [1] * (length - 2), [2], user=0)


def tournament(prompt, responses):
    """Every pair of so many responses to a prompt, in their order."""
    pairs = itertools.combinations(range(responses), 2)
    return [EncodedComparison([prompt], [prompt], [a], [b], user=0) for a, b in pairs]


def responses_in(comparisons, update):
    return {(c.prefix[0], *side) for c in (comparisons[i] for i in update) for side in (c.chosen, c.rejected)}


@pytest.mark.parametrize("group_by", ["none", "pair", "response"])
def test_an_epoch_holds_every_comparison_once_and_is_seeded(group_by):
    comparisons = [of_length(3 + (i * 37) % 101, prompt=i // 9) for i in range(203)]
    drawn = ((0, 0), (0, 0), (0, 1), (1, 0))
    epochs = [updates_of_epoch(comparisons, 8, seed, epoch, group_by) for seed, epoch in drawn]
    for updates in epochs:
        assert sorted(i for update in updates for i in update) == list(range(203))
        assert sorted(len(update) for update in updates)[1:] == [8] * 25
    assert epochs[0] == epochs[1] and epochs[0] != epochs[2] and epochs[0] != epochs[3]


def test_buckets_leave_little_padding():
    lengths = [10 + (i * 7919) % 200 for i in range(2000)]

    def padded(updates):
        return sum(len(u) * max(lengths[i] for i in u) for u in updates) / sum(lengths)

    in_order = [list(range(i, min(i + 16, 2000))) for i in range(0, 2000, 16)]
    comparisons = [of_length(length, prompt=i) for i, length in enumerate(lengths)]
    for group_by in ("none", "pair", "response"):
        assert padded(updates_of_epoch(comparisons, 16, 0, 0, group_by)) < 1.1 < 1.6 < padded(in_order)


def test_comparisons_of_one_pair_stay_together():
    """50 pairs of two lengths with four votes each: few updates of 8 break a pair up; without pairs most do."""
    pairs = [i % 50 for i in range(200)]
    comparisons = [of_length(10 + pair % 2, prompt=pair) for pair in pairs]

    def pairs_in(updates):
        return sum(len({pairs[i] for i in update}) for update in updates) / len(updates)

    together = updates_of_epoch(comparisons, 8, 0, 0, "pair")
    assert sorted(i for update in together for i in update) == list(range(200))
    assert pairs_in(together) <= 3 < 6 < pairs_in(updates_of_epoch(comparisons, 8, 0, 0))


def test_pairs_that_occur_once_leave_the_order_as_it_is():
    comparisons = [of_length(3 + (i * 37) % 101, prompt=i) for i in range(203)]
    assert updates_of_epoch(comparisons, 8, 3, 1, "pair") == updates_of_epoch(comparisons, 8, 3, 1, "none")


def test_an_update_grouped_by_response_holds_few_of_them():
    """All 780 pairs of 40 responses, 60 an update: no 60 pairs have fewer than 12 responses (12 * 11 / 2 = 66). Squares have
    two strips of 40 sqrt(60 / 1560) = 8, and an update that goes from one strip to the next a third one."""
    comparisons = tournament(prompt=0, responses=40)
    counts = [len(responses_in(comparisons, u)) for u in updates_of_epoch(comparisons, 60, 0, 0, "response")]
    assert len(counts) == 13 and min(counts) >= 12 and max(counts) <= 3 * 8 + 1
    at_random = [len(responses_in(comparisons, u)) for u in updates_of_epoch(comparisons, 60, 0, 0)]
    assert sum(counts) / 13 < 19 < 35 < sum(at_random) / 13


def test_grouped_by_response_a_prompt_stays_whole():
    """30 prompts with four responses each, so six comparisons, 12 an update: two prompts an update, each in one."""
    comparisons = [c for prompt in range(30) for c in tournament(prompt, responses=4)]
    updates = updates_of_epoch(comparisons, 12, 0, 0, "response")
    assert [len(responses_in(comparisons, u)) for u in updates] == [8] * 15


def test_micro_batches_of_an_update_grouped_by_response_hold_few_of_them_too():
    """All 780 pairs of 40 responses of 5 to 44 tokens, 60 an update, 8 a micro-batch: eight neighbours in a strip of 8 lower
    ranks (above) share a higher rank, or two: at most 8 + 2 responses, fewer near the diagonal. Cut by length they share less."""
    responses = [[i % 7] * (5 + i) for i in range(40)]
    pairs = itertools.combinations(responses, 2)
    comparisons = [EncodedComparison([1], [1], a, b, user=0) for a, b in pairs]
    counts = {}
    for group_by in ("response", "pair"):
        keys = ("method=prm", "user_model.aggregator=linear", "user_model.tokens=1", "optim.batch_size=60")
        config = tiny_config(*keys, "optim.micro_batch_size=8", f"optim.group_by={group_by}")
        parts = [
            part.indices
            for update in updates_of_epoch(comparisons, 60, 0, 0, "response")
            for part in plan_update(Task(config, tiny_model(config), comparisons), update)
        ]
        assert sorted(i for part in parts for i in part) == list(range(780))
        counts[group_by] = sum(len(responses_in(comparisons, part)) for part in parts) / len(parts)
    assert counts["response"] <= 10 and counts["response"] < 0.9 * counts["pair"]


@pytest.mark.parametrize("known", [1.0, 0.8])
@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize("processes", [1, 4, 8])
def test_processes_wait_little_for_each_other(processes, size, known):
    """TL;DR's lengths, packed rows, both branches: what is computed is at least 0.97 of what could be meanwhile."""
    rng, shares = random.Random(0), []
    for _ in range(20):  # updates of 64 comparisons of similar length
        middle = rng.lognormvariate(5.9, 0.4)
        readers = [(b, u) for b in range(64) for u in ((0, 1) if rng.random() < known else (0,))]
        length = [int(middle * rng.uniform(0.95, 1.05)) for _ in range(64)]
        groups = even_micro_batches(readers, [length[b] for b, _ in readers], size, processes, packed=True)
        assert sorted(i for group in groups for i in group) == list(range(len(readers)))
        assert len(groups) % processes == 0 and max(map(len, groups)) <= size
        assert len(groups) < len(readers) / size + processes  # no more than it takes
        T = [-(-sum(length[readers[i][0]] for i in group) // PACK_MULTIPLE) * PACK_MULTIPLE for group in groups]
        rounds = [T[start : start + processes] for start in range(0, len(T), processes)]
        shares.append(sum(T) / (processes * sum(map(max, rounds))))
    assert sum(shares) / len(shares) >= 0.97


def test_even_micro_batches_by_hand():
    trees, lengths = ["a", "b", "c", "d", "a"], [9, 5, 4, 1, 9]
    assert even_micro_batches(trees, lengths, 2, 1, packed=True) == [[0, 4, 3], [1, 2]]  # 9 + 1, 5 + 4
    assert even_micro_batches(trees, lengths, 2, 1, packed=False) == [[0, 4, 1], [2, 3]]  # by length: less padding
    assert even_micro_batches(trees, lengths, 3, 4, packed=False) == [[0, 4], [1], [2], [3]]
    assert len(even_micro_batches(trees, lengths, 3, 8, packed=True)) == 4  # no more than trees
    votes = even_micro_batches(["a"] * 40 + ["b"] * 2, [1] * 42, 2, 1, packed=True)
    assert sorted(map(len, votes)) == [10, 32]  # no more than 16 comparisons a tree, on average


def test_micro_batches_put_the_longest_first_and_equal_trees_together():
    trees, lengths = ["a", "b", "c", "a", "d", "b"], [7, 0, 9, 7, 1, 0]
    assert micro_batches(trees, lengths, 2) == [[2, 0, 3], [4, 1, 5]]
    assert micro_batches(trees, lengths, 1) == [[2], [0, 3], [4], [1, 5]]
    assert micro_batches(trees, lengths, 9) == [[2, 0, 3, 4, 1, 5]]
    votes = micro_batches(["a"] * 40 + ["b"] * 2, [1] * 42, 2)  # no more than 16 comparisons a tree, on average
    assert [len(part) for part in votes] == [32, 10]
