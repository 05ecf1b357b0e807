"""Everyday nouns by category, for the many-shot classification task; every word is in one category only."""

_LINES = """
animals: dog cat horse cow sheep goat pig lion tiger bear wolf fox deer rabbit mouse rat squirrel elephant giraffe
    zebra monkey gorilla camel donkey otter beaver hedgehog badger moose leopard cheetah panda kangaroo koala
    hamster buffalo antelope hyena jackal weasel
foods: bread cheese butter rice pasta soup apple banana pear peach grape cherry lemon melon carrot potato onion
    tomato cabbage lettuce spinach garlic bean sausage bacon ham omelette pancake biscuit cake pie pudding honey
    yogurt salad sandwich noodles strawberry cucumber pumpkin
clothes: shirt coat jacket sweater skirt dress trousers jeans sock shoe boot sandal hat cap scarf glove mitten belt
    tie blouse vest apron cloak gown robe pyjamas slipper sneaker cardigan hoodie shorts tights stocking bonnet
    beret tunic waistcoat overcoat raincoat underwear
vehicles: car truck bus van taxi tram train bicycle motorcycle scooter boat ship ferry yacht canoe kayak submarine
    helicopter airplane glider rocket tractor ambulance wagon carriage sled lorry barge raft hovercraft limousine
    minibus moped tanker locomotive jeep sailboat steamer airship tricycle
jobs: teacher doctor nurse farmer baker butcher carpenter plumber lawyer judge soldier sailor pilot singer actor
    painter writer poet cook waiter tailor barber engineer librarian gardener mechanic dentist scientist journalist
    architect electrician blacksmith accountant policeman fireman shepherd fisherman miner musician photographer
weather: rain snow wind storm thunder lightning hail fog mist frost cloud sunshine drizzle blizzard hurricane
    tornado cyclone gale breeze rainbow shower sleet drought heatwave typhoon downpour flood haze humidity monsoon
"""


def _parse(text: str) -> dict[str, tuple[str, ...]]:
    """Categories and their words from `category: word word ...` lines; an indented line continues the one before."""
    categories: dict[str, tuple[str, ...]] = {}
    for line in text.replace("\n    ", " ").strip().split("\n"):
        category, words = line.split(":")
        categories[category] = tuple(words.split())
    return categories


CATEGORIES = _parse(_LINES)
