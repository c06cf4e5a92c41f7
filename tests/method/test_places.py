"""Where user vectors stand (user_model.place): trees by hand, and every layout against plain sequences in float64."""

import pytest
import torch
from helpers import (
    ALPHA,
    KINDS,
    LAYOUTS,
    assert_same,
    assert_updates_are_plain,
    gradients,
    plain_backbone,
    random_comparisons,
    swapped,
    tiny_config,
    tiny_model,
    votes,
    with_tails,
)

from prlhf.backbone import visible
from prlhf.batch.trees import USERS_PER_TREE, Layout, Reading, collate, lay_out, tree_mask
from prlhf.evaluate.accuracy import score_users
from prlhf.method.plain import log_prob, p_dpo, p_rm, reward
from prlhf.score.score import score, tree_keys
from prlhf.score.task import Task
from prlhf.train.plan import plan_update
from prlhf.train.step import accumulate_gradients


@pytest.fixture(autouse=True)
def _small_blocks():
    """Rows of a few dozen positions are several blocks of queries to `visible_attention`."""
    with visible.in_blocks_of(8):
        yield


PROMPT_END, RESPONSE_END = "user_model.place=prompt_end", "user_model.place=response_end"
PRM = ("method=prm",)


def one_comparison(tail=1):
    (c,) = random_comparisons(1)
    return c._replace(prefix=[1, 10, 11], reference_prefix=[1, 11], chosen=[20, 2], rejected=[30, 31, 2], tail=tail)


def seen(batch):
    """What each position of a single row sees, by positions."""
    return [[k for k, visible in enumerate(row) if visible] for row in tree_mask(batch.seen_until_RT)[0, 0].tolist()]


def test_a_tree_of_two_readers_by_hand():
    """[BOS] 10 | e_4 e_4 11 | 20 EOS | 30 31 EOS | e_0 e_0 11 | 20 EOS | 30 31 EOS, of one comparison read by users 4 and 0."""
    c = one_comparison()
    batch = collate([c, c], [4, 0], Layout("tree", vectors=2, slot=1, place="prompt_end"))
    assert batch.input_ids_RT.tolist() == [[1, 10, 0, 0, 11, 20, 2, 30, 31, 2, 0, 0, 11, 20, 2, 30, 31, 2]]
    assert batch.positions_RT.tolist() == [[0, 1, 2, 3, 4, 5, 6, 5, 6, 7, 2, 3, 4, 5, 6, 5, 6, 7]]
    assert batch.vectors_at_SU.tolist() == [[2, 3], [10, 11]] and batch.users_S.tolist() == [4, 0]
    prompt, reader, generic = [0, 1], [2, 3, 4], [10, 11, 12]
    assert seen(batch)[:7] == [
        [0],
        [0, 1],
        [0, 1, 2],
        [0, 1, 2, 3],
        [*prompt, *reader],
        [*prompt, *reader, 5],
        [*range(7)],
    ]
    assert seen(batch)[7:10] == [[*prompt, *reader, *range(7, n)] for n in (8, 9, 10)]
    assert seen(batch)[10:13] == [[*prompt, *range(10, n)] for n in (11, 12, 13)]  # the second reader sees no first
    assert seen(batch)[15:] == [[*prompt, *generic, *range(15, n)] for n in (16, 17, 18)]
    assert batch.predicted_at_N.tolist() == [4, 5, 4, 7, 8, 12, 13, 12, 15, 16]
    assert batch.targets_N.tolist() == [20, 2, 30, 31, 2] * 2
    assert batch.last_at_M.tolist() == [6, 9, 14, 17]
    assert batch.chosen_rejected_B2.tolist() == [[0, 1], [2, 3]]


def test_a_text_has_no_tail_and_the_last_vector_predicts_the_answer():
    batch = collate([one_comparison(tail=0)], [4], Layout("tree", vectors=2, slot=1, place="prompt_end"))
    assert batch.input_ids_RT.tolist() == [[1, 10, 11, 0, 0, 20, 2, 30, 31, 2]]
    assert batch.predicted_at_N.tolist() == [4, 5, 4, 7, 8]


def test_a_tree_of_responses_read_by_two_users_by_hand():
    """[BOS] 10 11 | 20 EOS | e_4 e_4 | e_0 e_0 | 30 31 EOS | e_4 e_4 | e_0 e_0."""
    c = one_comparison()
    batch = collate([c, c], [4, 0], Layout("tree", vectors=2, slot=1, place="response_end"))
    assert batch.input_ids_RT.tolist() == [[1, 10, 11, 20, 2, 0, 0, 0, 0, 30, 31, 2, 0, 0, 0, 0]]
    assert batch.positions_RT.tolist() == [[0, 1, 2, 3, 4, 5, 6, 5, 6, 3, 4, 5, 6, 7, 6, 7]]
    assert batch.vectors_at_SU.tolist() == [[5, 6], [7, 8], [12, 13], [14, 15]]
    assert batch.users_S.tolist() == [4, 0, 4, 0]
    assert seen(batch)[6] == [*range(7)] and seen(batch)[8] == [*range(5), 7, 8]
    assert seen(batch)[15] == [0, 1, 2, *range(9, 12), 14, 15]
    assert batch.last_at_M.tolist() == [6, 13, 8, 15]  # (y1, 4), (y2, 4), (y1, 0), (y2, 0): their last vectors
    assert batch.response_at_N.tolist() == [3, 4, 9, 10, 11] * 2


@pytest.mark.parametrize("place, each", [("response_end", 6 * 5 + 48 * 2), ("prompt_end", 8 * 2 + 48 * 5)])
def test_the_order_of_readings_does_not_repeat_what_they_share(place, each):
    """Eight users read six responses of 5 tokens to a prompt of 2, user by user or response by response, in trees of at most
    3 (16 + 2) positions. A tree repeats the prompt and what its first reading continues, a response or a user's 2 vectors."""
    layout = Layout("tree", vectors=2, slot=1, place=place)
    readings = [Reading(user, (1, 10), (20 + y, 21, 22, 23, 2)) for user in range(8) for y in range(6)]
    for order in (readings, sorted(readings, key=lambda reading: reading.response)):
        trees = lay_out(order, layout, 16).trees_RT
        assert trees.shape[1] <= 54
        assert each < int((trees > 0).sum()) <= each + len(trees) * (2 + 5)


def test_the_reference_has_prompt_and_tail_as_its_prefix():
    layout = Layout("tree", vectors=2, slot=1, place="prompt_end")
    batch = collate([one_comparison()], None, layout._replace(vectors=0))
    assert batch.input_ids_RT.tolist() == [[1, 11, 20, 2, 30, 31, 2]]
    assert batch.positions_RT.tolist() == [[0, 1, 2, 3, 2, 3, 4]] and not batch.vectors_at_SU.numel()


def some_comparisons():
    """A pair on which users disagree, one of them unknown, and prompts with and without user text, of tails 0 to 2."""
    pairs = with_tails([*votes(1), *random_comparisons(4, seed=5, user_text=True)[1:]])
    return [pairs[0], *(swapped(pairs[0])._replace(user=user) for user in (4, 0)), *pairs[1:]]


@pytest.mark.parametrize("family", ["llama", "gptj"])
@pytest.mark.parametrize("kind", ["individual", "cluster"])
def test_an_update_with_users_behind_the_prompt_is_that_of_plain_sequences(kind, family):
    """Log-probs, loss and gradients of P-DPO."""
    keys = (*KINDS[kind], PROMPT_END, "loss.beta=0.2")
    config = tiny_config(*keys, family=family)
    sft = plain_backbone(config)

    def read(model, backbone, c, e_UD):
        return [log_prob(backbone, c.prefix, y, [], e_UD) for y in (c.chosen, c.rejected)]

    def loss_of(model, backbone, plain):
        return p_dpo(backbone, sft, model.user_model, plain, ALPHA, 0.2)

    comparisons = some_comparisons()
    assert_updates_are_plain(keys, family, comparisons, read, loss_of, score(tiny_model(config), comparisons, None, 4))


@pytest.mark.parametrize("family", ["llama", "gptj"])
@pytest.mark.parametrize("place", [PROMPT_END, RESPONSE_END])
@pytest.mark.parametrize("kind", ["uniform", "low rank"])
def test_an_update_of_a_reward_model_with_users_behind_is_that_of_plain_sequences(kind, place, family):
    """Rewards, loss and gradients: v . h of EOS, which has seen e_u, or of the last vector of e_u, which has seen the response."""

    def read(model, backbone, c, e_UD):
        return [reward(backbone, c.prefix, y, [], e_UD, model.value_head.weight[0]) for y in (c.chosen, c.rejected)]

    def loss_of(model, backbone, plain):
        return p_rm(backbone, model.user_model, plain, ALPHA, model.value_head.weight[0])

    assert_updates_are_plain((*PRM, *KINDS[kind], place), family, some_comparisons(), read, loss_of)


def positions_of(model, parts, comparisons):
    """The positions, without padding, that an update's parts compute."""
    batches = [model.collate([comparisons[i] for i in part.indices], part.users) for part in parts]
    return sum(int((batch.trees_RT > 0).sum()) for batch in batches)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_branches_share_the_prompt_in_one_part(layout):
    """By hand: prompt 2, tail 1, responses 2 and 3, three user vectors. Before the prompt 2 (3 + 3 + 5), behind it
    2 + 2 (3 + 1 + 5), of an unknown user 2 + 9; in single rows each response has all before it."""
    comparisons, expected = [one_comparison()._replace(user=4), one_comparison()._replace(user=0)], {}
    for place in ("before_prompt", "prompt_end"):
        config = tiny_config(f"user_model.place={place}", f"model.layout={layout}", "optim.micro_batch_size=1")
        task = Task(config, tiny_model(config), comparisons)
        found = [plan_update(task, update) for update in ([0], [1])]
        assert [len(parts) for parts in found] == [1 + (place == "before_prompt"), 1]
        expected[place] = [positions_of(task.model, parts, comparisons) for parts in found]
    if layout == "rows":
        assert expected["before_prompt"] == expected["prompt_end"] == [2 * 17, 17]
    else:
        assert expected == {"before_prompt": [22, 11], "prompt_end": [20, 11]}


def test_users_who_share_a_prompt_count_as_trees_of_three():
    """Seven voters of a pair and the generic user: eight readers, three trees' worth; each key's readers stay together."""
    pair, (_, other) = votes(1, 2, 3, 4), random_comparisons(2)
    comparisons = [*pair, *pair, other]
    users = [1, 2, 3, 4, 0, 0, 0, 1, 2]
    keys = tree_keys(tiny_model(tiny_config(PROMPT_END)), comparisons, users)
    assert [key[1] for key in keys] == [0, 0, 0, 1, 1, 1, 1, 0, 0]
    assert len({key[0] for key in keys[:8]}) == 1 and keys[8][0] != keys[0][0]
    assert len(set(tree_keys(tiny_model(tiny_config()), comparisons, users))) == 6


def test_trees_of_many_users_have_limits_and_the_right_numbers():
    """Twelve votes of five users on a pair of 101 + 71 + 91 tokens: trees of no more than three times these and a user's vectors
    (798): four readers (99 + 4 (3 + 2 + 162) = 767) and one. Log-probs as each vote alone has them."""
    (c,) = with_tails(random_comparisons(1, seed=3))
    c = c._replace(prefix=[1, *range(5, 105)], chosen=[*range(9, 79), 2], rejected=[*range(20, 110), 2], tail=2)
    comparisons = [c._replace(user=i % 5) if i < 6 else swapped(c)._replace(user=i % 5) for i in range(12)]
    users = [x.user for x in comparisons]
    model = tiny_model(tiny_config(PROMPT_END), noise=0.05)
    batch = model.collate(comparisons, users)
    assert c.length == 263 and batch.input_ids_RT.shape == (2, 767) and USERS_PER_TREE == 3
    found = score(model, comparisons, users, 8)
    for b, one in enumerate(comparisons):
        alone = score(model, [one], [one.user], 1)
        assert (found.chosen[b] - alone.chosen[0]).abs() < 1e-10 and (
            found.rejected[b] - alone.rejected[0]
        ).abs() < 1e-10


@pytest.mark.parametrize("keys", [(PROMPT_END,), (*PRM, PROMPT_END), (*PRM, RESPONSE_END)])
def test_sharing_nothing_gives_the_same_update(keys):
    comparisons, results = some_comparisons(), []
    for share, size in ((True, 8), (False, 8), (True, 1)):
        config = tiny_config(*keys, f"model.share_trees={share}", f"optim.micro_batch_size={size}", "lora.rank=2")
        model = tiny_model(config, noise=0.05)
        reference = score(model, comparisons, None, 4) if keys == (PROMPT_END,) else None
        accumulate_gradients(Task(config, model, comparisons, reference), range(len(comparisons)))
        results.append(gradients(model))
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


@pytest.mark.parametrize("keys", [(PROMPT_END,), (*PRM, RESPONSE_END)])
def test_an_evaluations_users_share_a_pass(keys):
    """The true, the generic and another user read each comparison in one pass of the backbone, in one row."""
    config = tiny_config(*keys, "evaluate.batch_size=8")
    comparisons, rows = [c._replace(user=1 + i) for i, c in enumerate(with_tails(random_comparisons(3)))], []
    model = tiny_model(config, noise=0.05)
    hook = model.backbone.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["inputs_embeds"])), with_kwargs=True
    )
    scores = score_users(Task(config, model, comparisons))
    assert rows == [3]
    hook.remove()
    alone = score(model, comparisons, [0] * 3, 1)
    assert (scores.generic_user.chosen - alone.chosen).abs().max() < 1e-10


def test_single_responses_have_the_rewards_of_comparisons():
    for place in (PROMPT_END, RESPONSE_END):
        model, comparisons = tiny_model(tiny_config(*PRM, place), noise=0.05), some_comparisons()
        expected = score(model, comparisons, [c.user for c in comparisons], 5)
        readings = [Reading(c.user, tuple(c.prefix), tuple(c.rejected), c.tail) for c in comparisons]
        with torch.no_grad():
            assert (model.rewards(readings) - expected.rejected).abs().max() < 1e-10
