package edgeprune

import android.content.Assets
import android.content.Context
import android.graphics.Bitmap
import java.io.File

/** `ASSETS FILES [WIDTH HEIGHT RGB]`: check the bundle of an app's assets; with an image (raw bytes), name its best class instead. */
fun main(arguments: Array<String>) {
    val model = EdgepruneModel(Context(Assets(File(arguments[0])), File(arguments[1])))
    if (arguments.size == 2) {
        val found = model.goldenCheck()
        println("${found.passed} ${found.largestError} ${found.sameClass}")
        return
    }
    val (width, height) = arguments.slice(2..3).map(String::toInt)
    val rgb = File(arguments[4]).readBytes().map { it.toInt() and 255 }.chunked(3)
    val pixels = rgb.map { (r, g, b) -> (255 shl 24) or (r shl 16) or (g shl 8) or b }.toIntArray()
    println(model.classify(Bitmap(width, height, pixels)).first())
}
