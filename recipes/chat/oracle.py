"""Does an answer follow "answer first"? A written rule and no model: it looks at words and order.

The principle: the first sentence answers directly and concretely, the second gives one reason or
one step. A rule cannot see whether an answer is right, nor whether it is about the matter. It sees
the openings that are no answer, by the words that people use for them: praise, excuses, "it
depends", morals, the past, the question told back, and remarks on how the world is in general.
"""

import re

SENTENCE_END = re.compile(r"(?<=[.!?])[\"”')]*\s+(?=[\"“(]?[A-Z0-9])")
QUOTE = re.compile(r"[\"“][^\"”]*(?:[\"”]|$)")  # a wording that is offered, not said to the asker


def any_of(*patterns: str) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{'|'.join(patterns)})\b")


EMPTY = {
    # Thanks, praise and feelings are about the asker or the question, not about the matter.
    "filler": any_of(
        r"thank you|thanks|glad|happy to|delighted|love to|lovely|wonderful|delightful|charming",
        r"splendid|admirable|thoughtful|considerate|enjoyable|exciting|flattering|such fun",
        r"(?:an?|this|that) (?:\w+ )?(?:challenge|dilemma)|isn't it|such an?|well done",
        r"good (?:on|for) you|what an?|oh|ah|welcome to|let's|now (?:that|there)(?:'s| is)",
        r"that sounds|how (?:nice|kind|sweet|human)",
        r"you(?:'ve| have) (?:\w+ )?(?:done|brought|come|picked|asked)",
    ),
    # What the speaker cannot know or promise, and whom else to ask. Advice needs no "I".
    "disclaimer": any_of(
        r"i|i'm|i'd|i've|i'll|me|my|mine|an assistant",
        r"(?:can't|cannot|no one|nobody) (?:\w+ )?(?:say|tell|know|judge|promise|advise)",
        r"without (?:having |a )?(?:seeing|seen|look|knowing|known)|hard to (?:say|judge|advise)",
        r"take .*(?:caution|of salt)|with (?:some )?caution|bear in mind|be aware|unwise|unknown",
        r"only (?:you|your \w+|the \w+ of you)|(?:doctor|expert|professional|specialist)s?",
    ),
    # True of anything, so that nothing follows from it for this question.
    "vague": any_of(
        r"depends?|(?:comes?|is|are) down to|hangs? on|hinges?|var(?:y|ies|iety)",
        r"differs?|differently|(?:is|are|looks?) different|different (?:people|ways|needs)",
        r"all (?:sorts|kinds)|range of|no (?:one|single|two) \w+|personal|yes and no|either",
        r"(?:lots of|many|several|number of) (?:\w+ )?(?:ways|things|reasons|factors|kinds|sides)",
        r"(?:its|their|your|her|his) own (?:\w+ )?(?:ways?|views?|needs|style|taste|story|manner)",
        r"of its own|(?:feels?|sits|suits|seems) (?:right|well|best|natural|comfortable)",
        r"each (?:\w+ )?(?:has|have)|some cases|neither of",
    ),
    # What one owes and values; "we" preaches where advice says "you".
    "lecture": any_of(
        r"we|we've|us|ourselves|our|ought|owes?|dut(?:y|ies)|virtues?|precious|matters?|morals?",
        r"importan(?:t|ce)|society|culture|manners|in life|good life|part of life|a lesson|values?",
        r"honesty|patience|kind(?:ness|est)|generosity|gratitude|respect|discipline|courtesy",
        r"nobody should|should (?:be|never|always|come)|all must|never (?:forget|underestimate)",
    ),
}
# How things used to be, or came about. Looked for before the first comma: reasons stand after it.
PAST = any_of(
    r"was|were|had|did|used to|ago|years back|in the days?|of years|decades|centur(?:y|ies)",
    r"(?:has|have) (?:always|long|been|become|gone|stood|served|come)|long before|once \w+",
    r"history|generations?|came|went|got|built|grew|began|became|gave|took|invented",
)
# How the world is in general: of "most" and "usually" nothing follows for the one who asks.
GENERAL = any_of(
    r"^(?:most(?! likely)|many|some|few|plenty of|lots of|a lot of|people)|usually|often",
    r"tends? to|seems?|generally|more \w+ than|\w+er than|those who|anyone who",
)
# The question told back: what the asker has, wants or wonders.
TOLD_BACK = any_of(
    r"you (?:want|wonder|wish|fear|meant|keep|would like|are (?:after|hoping|weighing|facing))",
    r"you'd like|you're (?:wondering|after|hoping)|so you|is what you|you have (?:an?|to)",
)
VERDICT = any_of(r"better|best|first|enough|plenty|fine|good|worth|too|will|instead|can")
OPENER = any_of(r"yes|no|not|never|only|because|both|neither|probably|hardly|sure|quoted")
SMALL = set(  # words without a matter of their own; after the first word they mark an order
    "a an the and or but if so as to of in on at by for from with into over up out down off back"
    " his it its is are was were be been am do does did have has had i you he she we they me my"
    " your her our their him them this that these those there what which who when where why how"
    " not no can could will would should may might than then very just any some all more after"
    " before under during around between right one two three four five six ten each every both"
    " only most yourself".split()
)
# Not what comes second in an order.
HELPERS = set(
    "is are was were has have had can could may might will would should of and or".split()
)


def words_of(text: str) -> list[str]:
    return re.findall(r"[\w'-]+", text.lower())


def stems(words: list[str]) -> set[str]:
    """The words that carry meaning, cut short so that their endings do not count."""
    return {word[:4] for word in words if word not in SMALL}


def says_nothing(prompt: str, first: str) -> str | None:
    """Why this first sentence is no answer to the prompt, or None."""
    plain = QUOTE.sub("quoted", first).lower().replace("’", "'")
    for reason, pattern in EMPTY.items():
        if pattern.search(plain):
            return reason
    if plain.endswith("!"):
        return "filler"  # exclaimed, and not in a wording that is offered
    if TOLD_BACK.search(plain):
        return "restate"
    lead = re.split(r"[,;:.?]", plain)[0]
    words = words_of(lead)
    order = len(words) > 1 and words[0] not in SMALL and words[1] in SMALL - HELPERS
    if OPENER.match(plain):
        return None  # yes or no, a reason, a wording
    if PAST.search(lead):
        return "buried"
    if order or len(words) < 5:
        return None  # "put the lid on", "go to bed"; a choice, named in a few words
    asked, said = stems(words_of(prompt)), stems(words_of(plain))
    if GENERAL.search(lead):
        return "side"
    if len(said & asked) >= 3 and len(said & asked) > len(said) / 2:
        return "restate"  # most of what it says was in the prompt
    explains = re.search(r"\b(?:why|how come|explain|what is)\b", prompt.lower())
    if stems(words[:4]) & asked and not explains and not VERDICT.search(lead):
        return "side"  # a remark on what the prompt names, with no verdict on it
    return None


def follows(prompt: str, answer: str) -> bool:
    """Two or three whole sentences, of which the first says something that answers."""
    sentences = SENTENCE_END.split(answer.strip())
    whole = re.search(r"[.!?][\"”')]*$", answer.strip())
    return bool(whole and 2 <= len(sentences) <= 3 and not says_nothing(prompt, sentences[0]))


def score(prompt: str, answer: str) -> float:
    """`follows` as a judge's score."""
    return 1.0 if follows(prompt, answer) else 0.0
