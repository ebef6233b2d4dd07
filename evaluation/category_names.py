"""The category names that published protocols draw prompts from."""

from __future__ import annotations


def _split(names: str) -> tuple[str, ...]:
    return tuple(" ".join(name.split()) for name in names.split(","))


#: COCO's 80 categories in VISOR's order.
COCO_CATEGORIES = _split(
    """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
    parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella,
    handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
    surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
    broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
    mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors,
    teddy bear, hair drier, toothbrush"""
)

#: The 100 categories of ADE20K that MULTIGEN uses.
ADE20K_CATEGORIES = _split(
    """airplane, animal, apparel, arcade machine, armchair, ashcan, awning, bag, ball, bannister, barrel, basket,
    bathtub, bed, bench, bicycle, boat, book, bookcase, booth, bottle, box, bulletin board, bus, cabinet, car, case,
    chair, chandelier, chest of drawers, clock, coffee table, column, computer, counter, countertop, curtain, cushion,
    desk, dishwasher, door, fan, fence, fireplace, flag, flower, food, fountain, glass, hood, kitchen island, lamp,
    light, microwave, minibike, mirror, monitor, ottoman, oven, painting, palm, person, pillow, plate, plaything, pole,
    pool table, pot, radiator, railing, refrigerator, sconce, screen, screen door, sculpture, seat, shelf, ship,
    signboard, sink, sofa, stairs, step, stool, stove, streetlight, swivel chair, table, television receiver, toilet,
    towel, trade name, traffic light, tray, truck, van, vase, wardrobe, washer, windowpane"""
)

#: Words of the Attend-and-Excite pairs (Chefer et al., 2023, arXiv:2301.13826).
PAIR_ANIMALS = _split("cat, dog, bird, bear, lion, horse, elephant, monkey, frog, turtle, rabbit, mouse")
PAIR_OBJECTS = _split("backpack, glasses, crown, suitcase, chair, balloon, bow, car, bowl, bench, clock, apple")
PAIR_COLOURS = _split("red, orange, yellow, green, blue, purple, pink, brown, gray, black, white")
#: Objects that an animal has "with" it and that have no colour then.
PAIR_WORN_OBJECTS = ("glasses", "crown", "bow")
