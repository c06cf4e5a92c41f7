"""Generation: independent of the company a row has, and the same as Hugging Face's generate."""

import hashlib
import math

import pytest
import torch
import transformers
from helpers import TOKENIZER, USERS, VOCABULARY, tiny_config, tiny_model

from prlhf.backbone.families import embeddings
from prlhf.backbone.loading import load_backbone
from prlhf.errors import UserError
from prlhf.generate.cache import STEP, GrowingCache
from prlhf.generate.decode import Decoding, Request, batches, check_decoding, choose, decoder_of, generate, gumbel_noise
from prlhf.generate.decoder import Context, Decoder, lanes_of
from prlhf.method.build import build_model


def requests():
    prompts = ["a", "tell me about rain\n", "x" * 30, "why?"]
    return [
        Request([1] + TOKENIZER(p, add_special_tokens=False)["input_ids"], user, f"{p} {user}")
        for p in prompts
        for user in (0, 2, 4)
    ]


def model_of(family, *overrides):
    return tiny_model(tiny_config(*overrides, family=family), noise=0.1).float().eval()


@pytest.mark.parametrize("family", ["llama", "gptj"])
@pytest.mark.parametrize("reads", ["place=before_prompt", "place=prompt_end", "aggregator=linear"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_does_not_depend_on_its_batch(family, reads, temperature):
    model = model_of(family, f"user_model.{reads}")
    decoding = Decoding(max_new_tokens=12, temperature=temperature, top_p=0.9, seed=1)
    together = generate(model, requests(), {2}, decoding)
    alone = [generate(model, [request], {2}, decoding)[0] for request in requests()]
    assert together == alone
    assert len({tuple(r.ids) for r in alone}) > 4  # rows do differ


@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_logits_agree_to_1e_4_with_no_batch_and_no_cache(family):
    """Every step's logits against one pass over the row's whole sequence, without cache or padding."""
    model = model_of(family)
    rows = requests()
    with torch.no_grad():
        decoder = decoder_of(model, rows)
        logits = [decoder.prefill()]
        tokens = []
        for _ in range(5):
            tokens.append(logits[-1].argmax(-1))
            logits.append(decoder.decode_one_token(tokens[-1]))
        for b, request in enumerate(rows):
            vectors = model.user_model(torch.tensor([request.user]))[0]
            ids = torch.tensor(request.ids + [int(t[b]) for t in tokens])
            embed = model.backbone.get_input_embeddings()(ids)
            whole = model.backbone(inputs_embeds=torch.cat([embed[:1], vectors, embed[1:]])[None]).logits[0, -6:]
            assert torch.allclose(torch.stack([x[b] for x in logits]), whole, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_rows_that_share_and_rows_that_leave_read_what_they_would_alone(family):
    """Nine responses to three prefixes, 5, 3 and 1 of them, with beginnings of their own (none, or of unequal lengths): logits
    against one pass over each whole sequence by the backbone alone, while responses leave until one is left."""
    model = model_of(family)
    words = embeddings(model.backbone, torch.arange(VOCABULARY)).detach()
    lengths = {"long": 30, "short": 4, "one": 1}
    prefixes = {key: words[[(7 * i + n) % VOCABULARY for i in range(n)]] for key, n in lengths.items()}
    keys = [*["long", "short", "long"] * 3, "long", "one"][1:]  # the responses to one prefix do not stand together
    for own_lengths in (0 * torch.arange(9), 1 + torch.arange(9) % 4):
        own = [words[100 + 10 * b : 100 + 10 * b + int(n)] for b, n in enumerate(own_lengths)]
        prompts = [Context(key, prefixes[key], mine) for key, mine in zip(keys, own)]
        rng = torch.Generator().manual_seed(0)
        with torch.no_grad():
            decoder = Decoder(model, model.user_model(torch.zeros(9, dtype=torch.long)), prompts)
            sequences, going = [torch.cat([prompt.shared_TD, prompt.own_SD]) for prompt in prompts], list(range(9))
            found, layouts = decoder.prefill(), set()
            for left in (
                [0, 1, 2, 3, 4, 5, 6, 7, 8],
                [0, 1, 3, 4, 5, 6, 7, 8],
                [0, 2, 3, 6, 7],
                [1, 2, 4],
                [0, 2],
                [1],
                [0],
            ):
                going, found = [going[row] for row in left], found[left]
                for row, b in enumerate(going):
                    whole = model.backbone(inputs_embeds=sequences[b][None]).logits[0, -1]
                    assert torch.allclose(found[row], whole, atol=1e-4), (left, b)
                decoder.keep(left)
                layouts.add((len(decoder.segments_RT), decoder.lanes))
                token_B = torch.randint(3, VOCABULARY, (len(going),), generator=rng)
                for b, token in zip(going, token_B.tolist()):
                    sequences[b] = torch.cat([sequences[b], words[token][None]])
                found = decoder.decode_one_token(token_B)
            assert len(decoder.segments_RT) == 1 and len(layouts) > 3


# Before the prompt: each prompt for each of two users, padded to the longer, with their vectors. Linear aggregator: each prompt for
# all users. Prompt end: the same without the tail, which follows the vectors of each response.
@pytest.mark.parametrize(
    "reads, prefill",
    [("place=before_prompt", [4 * (21 + 3)]), ("aggregator=linear", [2 * 21]), ("place=prompt_end", [2 * 19, 12 * 5])],
)
def test_a_prompt_is_read_once_for_all_who_read_it_alike(monkeypatch, reads, prefill):
    """Positions through the backbone, counted: twelve responses to two prompts, of 21 and 6 tokens, for two users."""
    rows = [
        Request([1, *range(40, end)], user, f"{n}", tail=2) for n in range(3) for end in (60, 45) for user in (1, 2)
    ]
    model, shapes = model_of("llama", f"user_model.{reads}"), []
    states = model.states
    monkeypatch.setattr(model, "states", lambda e_RTD, *rest: shapes.append(e_RTD.shape[:2]) or states(e_RTD, *rest))
    generate(model, rows, (), Decoding(max_new_tokens=3))
    assert [R * T for R, T in shapes] == [*prefill, 12, 12]
    assert shapes[-1][0] < 12  # several responses a row


@torch.no_grad()
def by_whole_sequences(model, request, place, decoding, ends):
    """A response whose every token is read off one pass of the backbone alone over the whole sequence. A draw is the largest of
    log p / temperature + Gumbel noise; the keys of the noise come from a generator that the request's name seeds."""
    at = 1 if place == "before_prompt" else len(request.ids) - request.tail
    e_UD, found = model.user_model(torch.tensor([request.user]))[0], []
    digest = hashlib.blake2b(f"{decoding.seed} {request.name}".encode(), digest_size=8).digest()
    keys = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    for _ in range(decoding.max_new_tokens):
        words_TD = embeddings(model.backbone, torch.tensor(request.ids + found))
        read_TD = torch.cat([words_TD[:at], e_UD, words_TD[at:]])
        values_V = model.backbone(inputs_embeds=read_TD[None]).logits[0, -1].double()
        if decoding.temperature:
            key = int(torch.randint(2**62, (1,), generator=keys))
            values_V = values_V / decoding.temperature + torch.tensor(noise(key, VOCABULARY), dtype=torch.float64)
        if (token := int(values_V.argmax())) in ends:
            break
        found.append(token)
    return found


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("place", ["before_prompt", "prompt_end"])
@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_greedy_and_sampled_ids_are_those_of_whole_sequences_shared_or_not(family, place, temperature):
    """Two prompts of unequal lengths and tails, three users, two responses to each, some of which end before others."""
    rows = [
        Request([1, *TOKENIZER(text, add_special_tokens=False)["input_ids"]], user, f"{text} {user} {n}", tail)
        for n in range(2)
        for text, tail in (("tell me about rain\n", 3), ("why?", 1))
        for user in (2, 0, 4)
    ]
    decoding, at_place = Decoding(max_new_tokens=6, temperature=temperature, seed=5), f"user_model.place={place}"
    plain = model_of(family, at_place)
    free = [by_whole_sequences(plain, row, place, decoding, ()) for row in rows]
    ends = {free[0][3], free[7][2]}
    expected = [by_whole_sequences(plain, row, place, decoding, ends) for row in rows]
    assert len({*map(len, expected)}) > 1 and len({*map(tuple, free)}) > 3
    unshared, rereading = "model.share_trees=false", "model.layout=rows"
    for keys in ((), (unshared,), (rereading,), (rereading, unshared)):
        model = model_of(family, at_place, *keys)
        check_decoding(model)
        assert [response.ids for response in generate(model, rows, ends, decoding)] == expected, keys


def test_responses_share_a_row_where_few_places_stay_empty():
    """At most 8, with 7 of 8 places in use: [8, 1] takes 10 places in rows of two, 12 in rows of three."""
    expected = {(1,) * 5: 1, (32,) * 8: 8, (3, 3, 3): 3, (8, 1): 2, (7,): 7, (64, 63): 8, (2, 1): 1, (9,): 5}
    assert {counts: lanes_of(counts) for counts in expected} == expected


def test_the_cache_is_what_concatenation_makes_and_seldom_copied():
    """Against Hugging Face's DynamicCache: prefill, then 200 columns, and rows chosen and repeated between."""
    ours, theirs = GrowingCache(), transformers.DynamicCache()
    rng, rooms = torch.Generator().manual_seed(0), set()
    rows = 3
    for n in range(200):
        key, value = (torch.randn(rows, 2, 5 if n == 0 else 1, d, generator=rng) for d in (4, 6))
        for layer in range(2):
            found, expected = ours.update(key, value + layer, layer), theirs.update(key, value + layer, layer)
            assert all(map(torch.equal, found, expected))
        rooms.add(ours.layers[0].keys.untyped_storage().nbytes())
        if n in (50, 120):
            chosen = torch.tensor([2, 0, 2, 1])
            theirs.batch_select_indices(chosen)
            T = ours.get_seq_length()
            ours.gather(chosen[:, None] % rows * T + torch.arange(T))
            rows = 4
    assert ours.get_seq_length() == 204 and len(rooms) <= 8 and min(rooms) == 3 * 2 * 4 * STEP * 4


def test_batches_keep_together_what_is_shared():
    x, y = [1, 5], [1, 6]
    rows = [Request(ids, user, "") for ids, user in ((x, 2), (y, 1), (x, 1), (x, 2), (y, 1), (x, 1))]
    assert batches(rows, 4) == [[0, 3, 2, 5], [1, 4]]
    assert batches([], 4) == []


@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_merged_adapters_say_the_same_and_leave_no_trace(family):
    model = model_of(family, "lora.rank=3")
    before = {name: p.clone() for name, p in model.state_dict().items()}
    rows = requests()[::2]
    found = generate(model, rows, {2}, Decoding(max_new_tokens=12))
    for request, response in zip(rows, found):  # greedy by whole passes, with the adapters beside the weights
        ids = list(request.ids)
        e_UD = model.user_model(torch.tensor([request.user]))[0]
        while len(ids) < len(request.ids) + 12:
            embed = embeddings(model.backbone, torch.tensor(ids))
            with torch.no_grad():
                logits = model.backbone(inputs_embeds=torch.cat([embed[:1], e_UD, embed[1:]])[None]).logits[0, -1]
            if (token := int(logits.argmax())) == 2:
                break
            ids.append(token)
        assert response.ids == ids[len(request.ids) :]
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[name], p) for name, p in before.items())


def test_vanilla_equals_hugging_faces_generate():
    model = model_of("llama", "user_model.kind=uniform", "user_model.tokens=0")
    for request in requests()[::3]:
        ids = torch.tensor([request.ids])
        expected = model.backbone.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=15, do_sample=False, pad_token_id=0, eos_token_id=2
        )[0, ids.shape[1] :].tolist()
        (found,) = generate(model, [request], {2}, Decoding(max_new_tokens=15))
        assert found.ids == [t for t in expected if t != 2]


def test_any_of_several_ends_ends_a_row_and_leaves_no_trace():
    model = model_of("llama")
    rows = requests()[:3]
    free = generate(model, rows, ends=(), decoding=Decoding(max_new_tokens=8))
    eos, other = free[0].ids[3], free[1].ids[2]
    assert eos != other
    stopped = generate(model, rows, ends={eos, other}, decoding=Decoding(max_new_tokens=8))
    for before, after in zip(free, stopped):
        first = next((n for n, token in enumerate(before.ids) if token in (eos, other)), 8)
        assert (after.ids, after.finished) == (before.ids[:first], first < 8)


def test_top_p_keeps_the_fewest_tokens_with_that_mass():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    drawn = set()
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        drawn.add(choose(logits, Decoding(temperature=1.0, top_p=0.7), [generator]).item())
    assert drawn == {0, 1}


def splitmix64(key, count):
    """By Python's own integers."""
    for n in range(1, count + 1):
        z = (key + n * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        yield z ^ z >> 31


def noise(key, count):
    return [-math.log(-math.log(((z >> 12) + 0.5) / 2**52)) for z in splitmix64(key, count)]


def test_gumbel_noise_is_splitmix64_for_each_row_alone():
    """The first numbers for the key 0 are those of the algorithm's published test."""
    assert next(splitmix64(0, 1)) == 0xE220A8397B1DCDAF
    keys = [0, 1, 2**62 - 1]
    found = gumbel_noise(torch.tensor(keys), 50)
    for b, key in enumerate(keys):
        expected = noise(key, 50)
        assert found[b].tolist() == pytest.approx(expected, abs=1e-9)
        assert torch.equal(gumbel_noise(torch.tensor([key]), 50)[0], found[b])


def test_sampling_follows_the_softmax():
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    generator = torch.Generator().manual_seed(0)
    draws = torch.cat([choose(logits, Decoding(temperature=2.0), [generator]) for _ in range(4000)])
    expected = torch.softmax(logits[0] / 2, dim=0)
    assert torch.allclose(draws.bincount(minlength=3) / 4000, expected, atol=0.03)


def test_generation_for_a_model_with_a_sliding_window_is_right_or_refused():
    config = transformers.MistralConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=20,
    )  # fmt: skip
    torch.manual_seed(0)
    backbone = transformers.MistralForCausalLM(config).eval()
    model = build_model(tiny_config("user_model.kind=uniform", "user_model.tokens=0"), TOKENIZER, 0, backbone)
    request = Request([1, 5, 6, 7], 0, "x")
    (found,) = generate(model, [request], (), Decoding(max_new_tokens=12))
    expected = backbone.generate(torch.tensor([request.ids]), max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert found.ids == expected[0, 4:].tolist()
    with pytest.raises(UserError, match="takes 24 positions.*reads 20"):
        generate(model, [request], (), Decoding(max_new_tokens=20))


def test_in_half_precision_a_row_alone_is_exact():
    """Batches of one say the same in any order; in float32 larger batches do too (above)."""
    config = tiny_config("model.dtype=bfloat16", "lora.rank=2", "model.width=64")
    model = build_model(config, TOKENIZER, USERS, load_backbone(config.model, TOKENIZER, 0)).eval()
    decoding = Decoding(max_new_tokens=12, temperature=1.0, seed=1)
    forth, back = ([generate(model, [r], (), decoding)[0] for r in rows] for rows in (requests(), requests()[::-1]))
    assert forth == back[::-1] and model.backbone.dtype == torch.bfloat16
