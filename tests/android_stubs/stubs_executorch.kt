// What the sample uses of org.pytorch:executorch-android, as its documentation describes it.
package org.pytorch.executorch

class Tensor {
    val dataAsFloatArray: FloatArray get() = TODO()

    companion object {
        @JvmStatic fun fromBlob(data: FloatArray, shape: LongArray): Tensor = TODO("$data $shape")
    }
}

class EValue {
    fun toTensor(): Tensor = TODO()

    companion object {
        @JvmStatic fun from(tensor: Tensor): EValue = TODO("$tensor")
    }
}

class Module {
    fun forward(vararg inputs: EValue): Array<EValue> = TODO("$inputs")

    companion object {
        @JvmStatic fun load(modelPath: String): Module = TODO(modelPath)
    }
}
